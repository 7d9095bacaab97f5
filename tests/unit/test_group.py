"""The group over which weights go, with a fake NCCL that blocks wherever NCCL may, and fake servers.

With gloo and real servers: test_server.py and test_pool.py.
"""

import contextlib
import datetime
import os
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launch import local, outcome
from megatron_fp16rl import platform, train
from megatron_fp16rl.recipe import Sync
from megatron_fp16rl.rollout.client import ServerError
from megatron_fp16rl.rollout.weight_sync import group as groups
from megatron_fp16rl.rollout.weight_sync.base import SyncFailed
from megatron_fp16rl.rollout.weight_sync.broadcast import _IGNORED, BroadcastTransport
from megatron_fp16rl.rollout.weight_sync.group import Group
from megatron_fp16rl.utils.processes import free_port
from tests import models
from tests.conftest import ROOT, python

BEGIN, END = "/begin_weight_update", "/end_weight_update"
JOIN, UPDATE = "/init_weights_update_group", "/update_weights_from_distributed"
LEAVE = "/destroy_weights_update_group"
_PATIENCE_S = 60  # of what is to go on at once; so long only where a test fails


class Nccl:
    """What NCCL does for rank 0: nothing returns before every server has its part in it, or an abort."""

    def __init__(self, monkeypatch):
        self.calls, self.servers = [], []
        self.forever = threading.Event()  # what is hung; set at the end of a test
        self.aborted, self.left = threading.Event(), threading.Event()
        fake = {"device": lambda: torch.device("cpu"), "prepare_sglang": lambda: None}
        fake_platform = SimpleNamespace(COLLECTIVES="nccl", **fake)
        monkeypatch.setattr(platform, "current", lambda: fake_platform)
        monkeypatch.setattr(dist, "broadcast", self.broadcast)
        monkeypatch.setattr(dist, "destroy_process_group", self.destroy)
        monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", self.abort)
        monkeypatch.setattr(Group, "_rendezvous", lambda self, *_: self)

    def serve(self, *names):
        self.servers = [Server(name, self) for name in names]
        return self.servers

    def broadcast(self, tensor, group, group_src, async_op):
        assert async_op
        self.calls.append("broadcast")
        for server in group.servers:  # the communicator is made in the first
            self._until(server.receives)
        ended = SimpleNamespace(is_completed=lambda: True, wait=lambda: None)
        for server in group.servers:
            server.receives.clear()
        return ended

    def destroy(self, handle):
        self.calls.append("destroy")
        for server in handle.servers:
            self._until(server.leaves)
        self.left.set()

    def abort(self, handle):
        self.calls.append("abort")
        self.aborted.set()

    def _until(self, event):
        deadline = time.monotonic() + _PATIENCE_S
        while not (event.wait(0.001) or self.aborted.is_set() or self.forever.is_set()):
            if time.monotonic() > deadline:  # whoever calls it without one is to fail, not to hang
                break
        if not event.is_set():
            raise RuntimeError("NCCL communicator was aborted")


class Server:
    """answers: to a path, what is done there, in place of taking part."""

    def __init__(self, name, nccl):
        self.url, self.nccl = f"http://{name}", nccl
        self.answers, self.requests = {}, []
        self.receives, self.leaves = threading.Event(), threading.Event()

    def post(self, path, body, admin, timeout_s):
        assert admin
        self.requests.append((path, body))
        name = path.removeprefix("/").split("_")[0]
        if name in self.answers:
            return self.answers[name]()
        if path == UPDATE:
            self.receives.set()
        if path == LEAVE:  # as ncclCommDestroy: it waits for rank 0
            self.leaves.set()
            assert self.nccl.left.wait(_PATIENCE_S)
        return {}

    def abort_weight_update(self, group, timeout_s):
        return "update" not in self.answers

    def paths(self):
        return [path for path, _ in self.requests]

    def hang(self):
        self.nccl.forever.wait(_PATIENCE_S)
        raise ServerError("no answer in time")

    def refuse(self, why="out of memory"):
        raise ServerError(f"{self.url} answered 400: {why}")


@pytest.fixture
def nccl(monkeypatch):
    fake = Nccl(monkeypatch)
    yield fake
    fake.forever.set()


def sender(timeout_s=_PATIENCE_S):
    return BroadcastTransport(Sync(timeout_s=timeout_s), 1, "127.0.0.1", torch.float16)


def weights(count=3):
    return iter([(f"layer.{i}", torch.ones(4).half()) for i in range(count)])


def synced(servers, timeout_s=_PATIENCE_S):
    """A sender that has sent version 1; and its group's name."""
    sync = sender(timeout_s)
    sync.send(weights(), "1", servers)
    return sync, sync.group.name


def test_a_new_group_first_broadcasts_one_element_and_only_the_last_bucket_flushes_caches(nccl):
    a, b = nccl.serve("a", "b")
    sync = sender()
    sync.bucket_bytes = 8
    assert sync.send(weights(), "1", [a, b]) == 24
    assert a.paths() == b.paths() == [JOIN, BEGIN, *[UPDATE] * 4, END]
    updates = [body for path, body in a.requests if path == UPDATE]
    names = [_IGNORED, "layer.0", "layer.1", "layer.2"]
    assert [body["names"] for body in updates] == [[name] for name in names]
    assert updates[0]["shapes"] == [[1]]
    assert [body["weight_version"] for body in updates] == [*["1-partial"] * 3, "1"]
    assert [body["flush_cache"] for body in updates] == [False, False, False, True]
    a.requests.clear()
    sync.send(weights(1), "2", [a, b])  # the same group: nothing is left to meet for
    assert a.paths() == [BEGIN, UPDATE, END]


def test_servers_and_rank_0_leave_a_group_together(nccl):
    a, b = nccl.serve("a", "b")
    sync, group = synced([a, b])
    sync.close()  # either waits for the other: whoever is asked later hangs
    assert nccl.calls[-1] == "destroy"
    assert a.requests[-1] == b.requests[-1] == (LEAVE, {"group_name": group})


def test_a_group_without_a_member_is_aborted_and_left_by_the_others(nccl):
    a, b, c = nccl.serve("a", "b", "c")
    nccl.left.set()  # an abort waits for nobody, and neither does who is left
    sync, group = synced([a, b])
    sync.send(weights(), "2", [b, c])
    assert "destroy" not in nccl.calls
    assert nccl.calls.count("abort") == 1
    assert (LEAVE, {"group_name": group}) in b.requests
    assert LEAVE not in a.paths()
    assert b.paths()[-3:] == c.paths()[-3:] == [UPDATE, UPDATE, END]
    assert sync.group.servers == [b, c]


def test_a_server_that_does_not_leave_is_named(nccl):
    a, b = nccl.serve("a", "b")
    sync, _ = synced([a, b], 0.3)
    a.answers["destroy"] = a.hang
    with pytest.raises(
        SyncFailed, match=r"leaving .* took more than 0.3 s .*no answer from http://a"
    ):
        sync.send(weights(), "2", [a])
    assert sync.alive([a]) == [a]
    assert nccl.calls.count("abort") == 1  # it is left already


@pytest.mark.parametrize(
    ("answer", "timeout_s", "error", "message"),
    [
        (Server.hang, 0.3, SyncFailed, r"broadcast of 2 bytes took .* 0.3 s .* from http://b$"),
        (Server.refuse, _PATIENCE_S, ServerError, "http://b answered 400: out of memory"),
    ],
)
def test_a_broadcast_without_a_server_ends_when_it_refuses_or_is_late(
    answer, timeout_s, error, message, nccl
):
    a, b = nccl.serve("a", "b")
    b.answers["update"] = lambda: answer(b)
    sync = sender(timeout_s)
    with pytest.raises(error, match=message):
        sync.send(weights(), "1", [a, b])
    assert sync.alive([a, b]) == [a]
    # Never destroyed: that would wait for the broadcast.
    assert nccl.calls == ["broadcast", "abort"]
    b.answers.clear()
    nccl.aborted.clear()
    sync.send(weights(), "1", [a])  # the group is forgotten, whatever became of it
    assert a.paths()[-3:] == [UPDATE, UPDATE, END]
    assert LEAVE not in a.paths()


def test_a_hung_abort_is_not_waited_for(nccl, monkeypatch):
    a, b = nccl.serve("a", "b")
    sync, _ = synced([a, b], 0.3)
    monkeypatch.setattr(groups, "_ABORT_S", 0.05)
    abort, aborted = threading.Event(), threading.Event()
    monkeypatch.setattr(
        dist.distributed_c10d,
        "_abort_process_group",
        lambda _: (abort.set(), nccl.forever.wait(_PATIENCE_S), aborted.set()),
    )
    b.answers["update"] = b.hang
    with pytest.raises(SyncFailed):
        sync.send(weights(), "2", [a, b])
    assert sync.alive([a, b]) == [a]
    assert abort.is_set()
    assert not aborted.is_set()  # it was not waited for
    assert sync.group is None


def test_a_server_that_cannot_flush_its_cache_is_not_updated(nccl):
    (a,) = nccl.serve("a")
    said = "Weights were updated, but the cache was not flushed"

    def update():
        a.receives.set()
        if a.requests[-1][1]["flush_cache"]:
            a.refuse(said)

    a.answers["update"] = update
    with pytest.raises(ServerError, match=said):
        sender().send(weights(), "1", [a])
    assert END not in a.paths()


def stand_in_for_sglang(monkeypatch, init_custom_process_group):
    utils = ModuleType("sglang.srt.utils")
    utils.init_custom_process_group = init_custom_process_group
    monkeypatch.setitem(sys.modules, "sglang.srt.utils", utils)


@pytest.mark.parametrize("before", [None, "3"])
def test_torch_does_not_abort_the_process_for_an_nccl_group(before, monkeypatch):
    variable, given = "TORCH_NCCL_ASYNC_ERROR_HANDLING", {}
    stand_in_for_sglang(
        monkeypatch, lambda **options: given.update(options, handling=os.environ[variable])
    )
    monkeypatch.setattr(groups.tcp_store, "open_store", lambda *_: dist.HashStore())
    monkeypatch.delenv(variable, raising=False)
    if before is not None:
        monkeypatch.setenv(variable, before)
    Group([], 1, "127.0.0.1", 120)._rendezvous("nccl", 1, 2)
    assert given["handling"] == "0"
    assert given["timeout"].total_seconds() == 1200  # the watchdog's, far behind ours
    assert os.environ.get(variable) == before


def test_latecomers_to_a_failed_rendezvous_are_released(monkeypatch):
    """As a server that was stopped, and then follows an old request: torch alone would look for half an hour."""
    stand_in_for_sglang(monkeypatch, None)  # it does not come to that
    port = free_port("127.0.0.1")
    with pytest.raises(dist.DistStoreError):
        Group([], 1, "127.0.0.1", 1)._rendezvous("gloo", port, 3)
    patience = datetime.timedelta(seconds=_PATIENCE_S)
    for _ in range(2):
        late = dist.TCPStore("127.0.0.1", port, 3, False, patience)
        with pytest.raises(dist.DistNetworkError):
            late.get("the address of rank 0")


@pytest.mark.parametrize("done", [True, False])
def test_a_rank_that_has_done_all_destroys_no_group(done, monkeypatch):
    """NCCL would wait for servers, which go on."""
    order = []

    class Trainer:
        def __init__(self, *_):
            self.run = contextlib.ExitStack()
            self.run.callback(lambda: order.append("files"))

        def begin(self):
            return None

        def loop(self, evaluation, _):
            return done, evaluation

        def finish(self, _):
            order.append("export")

    monkeypatch.setattr(train, "Trainer", Trainer)
    monkeypatch.setattr(train, "initialize", lambda *_: None)
    monkeypatch.setattr(train.gc, "freeze", lambda: None)
    monkeypatch.setattr(dist, "barrier", lambda: order.append("all ranks"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda *_: order.append("destroyed"))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert train.train(models.recipe(), Path(), Path()) is done
    assert order == [*(["export"] if done else []), "files", "all ranks"]


HUNG = """
    import os, sys, threading
    from launch import outcome, rank

    def run(folder):
        # A collective that never ends, in a thread that an orderly end of the process would wait for.
        threading.Thread(target=threading.Event().wait).start()
        print("all is written")
        os.environ["RANK"] = "0"
        return outcome.DONE

    os.environ["FP16RL_LOCK_HELD"] = "1"
    rank._run = run
    rank.main()
"""


def test_a_run_ends_whatever_a_group_still_does(tmp_path):
    (tmp_path / "private").mkdir()
    done = python("-c", textwrap.dedent(HUNG), tmp_path, timeout=60)
    assert done.stdout == "all is written\n"
    assert outcome.read(tmp_path).word == outcome.DONE


def test_what_rank_0_said_last_is_shown_however_fast_it_left(tmp_path, monkeypatch, capfdbinary):
    last = "import sys; from pathlib import Path; from launch import outcome\n"
    last += "outcome.write(Path(sys.argv[1]), outcome.DONE); print('last words')"
    command = [sys.executable, "-c", last, str(tmp_path)]
    spawn, show, ended = local.spawn, local._show, threading.Event()

    def late(output, log):
        ended.wait(_PATIENCE_S)
        show(output, log)

    monkeypatch.setattr(local, "spawn", lambda _, *given, **more: spawn(command, *given, **more))
    monkeypatch.setattr(local, "_show", late)
    monkeypatch.setattr(local, "stop", lambda *_, **__: ended.set())  # the ranks have
    monkeypatch.setattr(local, "_check_model", lambda _: None)
    monkeypatch.chdir(ROOT)
    rollout = {**models.recipe().rollout.model_dump(), "replay": "recorded"}
    recipe = models.recipe(rollout=rollout)
    assert local.run(recipe, tmp_path, lambda _: None) == outcome.DONE
    sys.stdout.flush()
    assert capfdbinary.readouterr().out.endswith(b"last words\n")
