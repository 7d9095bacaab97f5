"""Ranks that run a function of tests/workers/, forked from one process that has imported everything.

Importing takes ten times as long as most tests. `python -m tests.rank patched` reads a request a
line, JSON, and answers each with the exit codes of its ranks. `python -m tests.rank unpatched` does so
too, and has patched nothing. With arguments WORKER FOLDER JSON it is a rank.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from megatron_fp16rl.utils.processes import PARENT_VARIABLE, die_with_parent, local_rank_environment

_GRACE_S = 10  # for the other ranks, once one has failed


def main(patched: bool) -> None:
    """Serves requests until stdin ends."""
    die_with_parent()
    if patched:
        from megatron_fp16rl import platform

        platform.current().prepare_learner()
    import transformers.models.auto.modeling_auto  # noqa: F401

    import megatron_fp16rl.learner.checkpoint  # noqa: F401
    from tests.workers import common  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        ranks = range(request["ranks"])
        pids = [_fork(rank, request) for rank in ranks]
        print(json.dumps(_wait(pids, request["timeout"])), flush=True)


def _fork(rank: int, request: dict) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(f"{request['folder']}/{rank}.log", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ[PARENT_VARIABLE] = str(parent)
        die_with_parent()
        os.environ.update(local_rank_environment(rank, request["ranks"], request["port"]))
        run(request["worker"], Path(request["folder"]), request["arguments"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a worker may leave a collective pending on purpose


def run(worker: str, folder: Path, arguments: dict) -> None:
    """Runs a worker, "module.name" of tests/workers/, and writes what it returns."""
    module, name = worker.split(".")
    result = getattr(importlib.import_module(f"tests.workers.{module}"), name)(**arguments)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(result))


def _wait(pids: list[int], timeout: float) -> list[int]:
    """Exit codes; ranks that are late are killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(patched=sys.argv[1] == "patched")
    else:  # one rank of one request, in a process of its own
        run(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
        sys.stdout.flush()
        os._exit(0)
