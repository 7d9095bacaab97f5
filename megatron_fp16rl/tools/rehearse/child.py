"""`python -m megatron_fp16rl.tools.rehearse.child train ...` is `fp16rl train ...`, and ends with who started it.

Several commands, with AND between them, run one after the other: what takes longest is to import.
"""

import itertools
import sys

from megatron_fp16rl.cli import app
from megatron_fp16rl.utils.processes import die_with_parent

AND = "--and"


def main(arguments: list[str]) -> int:
    """The exit code of the first command that fails, or 0."""
    for is_and, command in itertools.groupby(arguments, AND.__eq__):
        if not is_and and (code := app(list(command), standalone_mode=False)):
            return code
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
