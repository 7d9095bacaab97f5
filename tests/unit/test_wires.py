"""How the ends of a sliced weight update tell each other to stop, with a real store."""

import datetime
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megatron_fp16rl.models.parts import whole
from megatron_fp16rl.rollout.weight_sync import wire
from megatron_fp16rl.rollout.weight_sync.base import SyncFailed
from megatron_fp16rl.utils.processes import free_port


@pytest.fixture
def ends():
    """Two ends of one wire, each with a connection of its own to the store."""
    port = free_port("127.0.0.1")
    timeout = datetime.timedelta(seconds=30)
    store = dist.TCPStore("127.0.0.1", port, None, True, timeout, wait_for_workers=False)
    both = [wire.Wires("test", wire.connect("127.0.0.1", port, 30)) for _ in range(2)]
    yield both
    for end in both:
        end.abandon()
    del store


def refuse(reason):
    raise RuntimeError(reason)


def test_an_end_that_gives_up_ends_the_wait_of_the_other(ends):
    sender, receiver = ends
    forever = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(sender.watched, forever.wait, 50, "sending")
        with pytest.raises(SyncFailed, match=r"^receiving broke off: no memory$"):
            receiver.watched(lambda: refuse("no memory"), 50, "receiving")
        assert str(waiting.exception(60)) == "receiving broke off: no memory"
    forever.set()
    with pytest.raises(SyncFailed, match="no memory"):  # nothing is begun again over these wires
        sender.check()


def test_an_end_that_nobody_answers_gives_up_in_time_and_says_so(ends):
    forever = threading.Event()
    late = r"sending weights took more than 0.2 s \(sync.timeout_s\)"
    with pytest.raises(SyncFailed, match=late):
        ends[0].watched(forever.wait, 0.2, "sending weights")
    with pytest.raises(SyncFailed, match=late):
        ends[1].check()
    forever.set()


def test_a_look_may_end_the_wait(ends):
    forever = threading.Event()
    with pytest.raises(SyncFailed, match="http://a answered 400: busy"):
        ends[0].watched(forever.wait, 50, "sending", lambda: refuse("http://a answered 400: busy"))
    forever.set()


def test_parts_survive_the_store(ends, monkeypatch):
    monkeypatch.setattr(wire, "_VALUE_BYTES", 30)
    parts = [whole("model.norm.weight", (7,)), *whole("lm_head.weight", (9, 4)).halves()]
    wire.write_json(ends[0].store, "offers", wire.listed(parts))
    assert wire.parts_of(wire.read_json(ends[1].store, "offers")) == parts
