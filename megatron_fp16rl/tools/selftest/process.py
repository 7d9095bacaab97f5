"""The process of one row: `python -m megatron_fp16rl.tools.selftest.process NAME FOLDER ANSWER [--quick]`"""

import sys
from pathlib import Path

from megatron_fp16rl.tools.selftest.result import Answer, NotHere, Setting
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import die_with_parent


def main() -> None:
    """Writes the row's answer; an error ends it without one."""
    die_with_parent()
    from megatron_fp16rl.tools.selftest.rows import ROWS

    name, folder, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir()
    try:
        answer = Answer(checks=ROWS[name].run(Setting("--quick" in sys.argv, folder)))
    except NotHere as reason:
        answer = Answer(not_here=str(reason))
    write_text(file, answer.model_dump_json())
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
