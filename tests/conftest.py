"""What tests share: ranks that run a worker together, tiny models, one server for all."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_fp16rl.utils.processes import free_port, local_rank_environment, spawn
from tests import slurm_cluster

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
# fp32 is fp32, on a GPU too: Transformer Engine asks cuBLAS for TF32, whose 10 bits are those of fp16.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
# SGLang would compile a router's few lines in each server of a mixture of experts: as many seconds as its start.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# Everything that tests cache lives and dies with them.
_forkers: dict[str, subprocess.Popen] = {}
_cache = tempfile.mkdtemp(prefix="fp16rl-tests-")
os.environ["FP16RL_CACHE"] = _cache
os.environ["HF_DATASETS_CACHE"] = f"{_cache}/datasets"


# Files that take long: with a few processes, one had better begin with them.
_LONG = (
    *("test_pool", "test_jobs", "test_train", "test_rehearsal", "test_ahead", "test_smollm2"),
    *(
        "test_supervise",
        "test_selftest",
        "test_recipes_fit",
        "test_platform",
        "test_resume",
        "test_layouts",
    ),
)


# Files that share what a worker starts once: a rollout server, a Slurm cluster.
_SHARED = {
    **dict.fromkeys(("test_pool", "test_evaluation", "test_security", "test_server"), "server"),
    "test_study": "server",
    **dict.fromkeys(("test_jobs", "test_control", "test_preflight"), "cluster"),
    **dict.fromkeys(("test_slurm", "test_bench"), "cluster"),
}


def pytest_collection_modifyitems(items):
    """Long files first, so that no process is left alone with one at the end."""
    order = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(_LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile, files that share a server or a cluster run in one process, too.

    xdist 3.8 has loadgroup for that, which has no effect under pytest 9.2.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return _SHARED.get(Path(file).stem, file)

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_sessionfinish():
    for process in _forkers.values():
        process.kill()
        process.wait()
    shutil.rmtree(_cache, ignore_errors=True)


def skip(reason: str) -> None:
    """Skips a test for want of something; in CI ($FP16RL_CI) that is a failure."""
    pytest.fail(reason) if os.environ.get("FP16RL_CI") else pytest.skip(reason)


def python(*arguments, environment=None, timeout=300, check=True, cwd=ROOT):
    """Runs Python, in the repository's root unless told; returns the finished process, its output captured."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_ranks(
    ranks: int, worker: str, timeout: float = 180, imported: str = "patched", **arguments
) -> list:
    """Runs "module.name" of tests/workers/ on `ranks` gloo ranks; returns what each returned.

    imported: the state of Megatron when the worker begins: patched, unpatched, or nothing is imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port("127.0.0.1")
        if imported == "nothing" or torch.cuda.is_available():
            codes = _start_ranks(ranks, worker, timeout, folder, port, arguments)
        else:
            request = {"worker": worker, "folder": folder, "arguments": arguments}
            request |= {"ranks": ranks, "port": port, "timeout": timeout}
            codes = _fork_ranks(imported, request)
        if any(codes):
            logs = [(Path(folder) / f"{rank}.log").read_text()[-4000:] for rank in range(ranks)]
            raise AssertionError(f"exit codes {codes}\n" + "\n".join(logs))
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def _start_ranks(ranks, worker, timeout, folder, port, arguments):
    processes = []
    for rank in range(ranks):
        with open(f"{folder}/{rank}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.rank", worker, folder, json.dumps(arguments)],
                    cwd=ROOT,
                    env={**os.environ, **local_rank_environment(rank, ranks, port)},
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def forker(imported="patched"):
    """The process that ranks are forked from."""
    if imported not in _forkers:
        pipes = {"stdout": subprocess.PIPE, "stdin": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.rank", imported]
        _forkers[imported] = spawn(command, _log_of(imported), cwd=ROOT, **pipes)
    return _forkers[imported]


def _log_of(imported):
    return Path(_cache) / f"ranks-{imported}.log"


def _fork_ranks(imported, request):
    process = forker(imported)
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        del _forkers[imported]
        raise AssertionError(f"tests.rank ended:\n{_log_of(imported).read_text()}")
    return json.loads(answer)


def assert_replicas_agree(ranks):
    """Shards of the same name are bit-equal on all ranks that hold them."""
    seen = {}
    for shards in ranks:
        for name, digest in shards.items():
            assert seen.setdefault(name, digest) == digest, name


DEAD_PROXY = "http://127.0.0.1:9"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real FP16 server on a tiny random Qwen3, for all tests that only talk to one.

    It can write its hidden states into "hidden" beside its log.
    """
    from megatron_fp16rl.models.build import model_folder
    from megatron_fp16rl.rollout import server as servers
    from megatron_fp16rl.tools.study import hidden
    from tests.models import QWEN3, recipe

    folder = tmp_path_factory.mktemp("server")
    watching = hidden.server_options(folder / "hidden", QWEN3["num_hidden_layers"])
    wanted = recipe(rollout={**recipe().rollout.model_dump(), "sglang": watching})
    # A proxy that nobody listens at: a site's is for the world outside. A Python that is called by its path.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", DEAD_PROXY)
        here, path = str(Path(sys.executable).parent), os.environ["PATH"].split(os.pathsep)
        patch.setenv("PATH", os.pathsep.join(folder for folder in path if folder != here))
        started = servers.start(
            servers.ServerConfig.of(wanted), model_folder(wanted.model), folder, folder, 0
        )
    try:
        servers.wait_until_healthy([started], 300, lambda line: None)
        yield started
    finally:
        servers.stop_servers([started])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Four nodes of a real Slurm."""
    if lacking := slurm_cluster.missing():
        skip(f"a Slurm cluster wants {', '.join(lacking)}")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("cluster") / "slurm", 4) as made:
        yield made
