"""Runs one SGLang server: `python -m megatron_fp16rl.rollout.serve KEYS_FILE [sglang arguments]`.

The API keys come from a file, so that no process list shows them. SGLang spawns its scheduler and
detokenizer with this module as their main module, so what is done here at import is done there too.
"""

import json
import sys
from pathlib import Path

from megatron_fp16rl import platform

platform.current().prepare_server()


def main() -> None:
    """Serves until killed."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    from megatron_fp16rl.processes import die_with_parent

    die_with_parent()
    keys = json.loads(Path(sys.argv[1]).read_text())
    arguments = [*sys.argv[2:], "--api-key", keys["api"], "--admin-api-key", keys["admin"]]
    run_server(prepare_server_args(arguments))


if __name__ == "__main__":
    main()
