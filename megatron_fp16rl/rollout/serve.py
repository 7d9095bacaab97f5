"""Runs one SGLang server: `python -m megatron_fp16rl.rollout.serve KEYS_FILE [sglang arguments]`.

The API keys come from a file, so that no process list shows them. SGLang spawns its scheduler and
detokenizer with this module as their main module, so what is done here at import is done there too.
"""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_fp16rl import platform
from megatron_fp16rl.models.config import register_aliases
from megatron_fp16rl.platform import nccl
from megatron_fp16rl.utils.processes import die_with_parent


def prepare() -> dict[str, str]:
    """Prepares this process, the server's main one or a child of it. Returns the API keys."""
    die_with_parent()
    keys = json.loads(Path(sys.argv[1]).read_text())
    make_record = logging.getLogRecordFactory()

    def without_keys(*args: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*args, **options)
        text = record.getMessage()
        if any(key in text for key in keys.values()):
            for key in keys.values():
                text = text.replace(key, "***")
            record.msg, record.args = text, None
        return record

    # SGLang 0.5.23 logs all its arguments, keys among them (entrypoints/engine.py).
    logging.setLogRecordFactory(without_keys)
    platform.current().prepare_server()
    register_aliases()
    return keys


def main(keys: dict[str, str]) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    keep_private()
    arguments = prepare_server_args([*sys.argv[2:], *key_arguments(keys)])
    agreed = {name: os.environ[name] for name in nccl.NAMES if name in os.environ}
    arguments.resolve_once()  # overwrites some of them if the server is deterministic
    os.environ.update(agreed)
    run_server(arguments)


def keep_private() -> None:
    """Closes what SGLang 0.5.23 leaves open to the network, or to holders of the api key alone."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import AuthLevel
    from starlette.routing import WebSocketRoute

    # /server_info returns all arguments, the admin key among them.
    for endpoint in (http_server.server_info, http_server.get_server_info):
        endpoint._auth_level = AuthLevel.ADMIN_OPTIONAL
    # SGLang checks no key of a web socket.
    routes = http_server.app.router.routes
    routes[:] = [route for route in routes if not isinstance(route, WebSocketRoute)]
    # torch's TCPStore listens on every interface, and anyone may write to it. On one machine a file in the
    # private folder TMPDIR does the same.
    if not any(argument.startswith("--nnodes") for argument in sys.argv):
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = (
            f"file://{tempfile.gettempdir()}/store"
        )


def key_arguments(keys: dict[str, str]) -> list[str]:
    """The keys as options, each in one word: a key may begin with a dash."""
    return [f"--api-key={keys['api']}", f"--admin-api-key={keys['admin']}"]


if __name__ in ("__main__", "__mp_main__"):
    api_keys = prepare()
if __name__ == "__main__":
    main(api_keys)
