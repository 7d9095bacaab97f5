"""What tests share: ranks that run a worker together, tiny models, one server for all."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_fp16rl.processes import free_port

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Everything that tests cache lives and dies with them.
_cache = tempfile.mkdtemp(prefix="fp16rl-tests-")
os.environ["FP16RL_CACHE"] = _cache


def pytest_sessionfinish():
    shutil.rmtree(_cache, ignore_errors=True)


def skip(reason: str) -> None:
    """Skips a test for want of something; in CI ($FP16RL_CI) that is a failure."""
    pytest.fail(reason) if os.environ.get("FP16RL_CI") else pytest.skip(reason)


def python(*arguments, environment=None, timeout=300, check=True):
    """Runs Python in the repository's root; returns the finished process, its output captured."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_ranks(ranks: int, worker: str, timeout: float = 180, **arguments) -> list:
    """Runs a function of tests/workers.py on `ranks` gloo ranks; returns what each returned."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port("127.0.0.1")
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.workers", worker, folder, json.dumps(arguments)],
                cwd=ROOT,
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": "lo",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            outputs = [p.communicate(timeout=timeout)[0] for p in processes]
        finally:
            for p in processes:
                p.kill()
        if any(p.returncode for p in processes):
            raise AssertionError("\n".join(o[-4000:] for o in outputs))
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def assert_replicas_agree(ranks):
    """Shards of the same name are bit-equal on all ranks that hold them."""
    seen = {}
    for shards in ranks:
        for name, digest in shards.items():
            assert seen.setdefault(name, digest) == digest, name


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real FP16 server on a tiny random Qwen3, for all tests that only talk to one."""
    from megatron_fp16rl.rollout import server as servers
    from megatron_fp16rl.weights.build import model_folder
    from tests.models import recipe

    folder = tmp_path_factory.mktemp("server")
    wanted = recipe()
    started = servers.start(wanted, model_folder(wanted.model), folder, folder, 0)
    try:
        servers.wait_until_healthy([started], 300, lambda line: None)
        yield started
    finally:
        from megatron_fp16rl.processes import stop

        stop([started.process])
