"""How the ends of a sliced weight update tell each other to stop: in threads, with a real store."""

import datetime
import threading
import time

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


def in_threads(*works):
    """What each returns, or the error that it raises."""
    results = [None] * len(works)

    def run(i):
        try:
            results[i] = works[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_an_end_that_gives_up_ends_the_wait_of_the_other(ends):
    sender, receiver = ends
    forever = threading.Event()

    def fails():
        raise RuntimeError("no memory")

    began = time.monotonic()
    first, second = in_threads(
        lambda: sender.watched(forever.wait, 50, "sending"),
        lambda: receiver.watched(fails, 50, "receiving"),
    )
    forever.set()
    assert isinstance(first, SyncFailed)
    assert str(first) == str(second) == "receiving broke off: no memory"
    assert time.monotonic() - began < 50
    with pytest.raises(SyncFailed, match="no memory"):  # nothing is begun again over these wires
        sender.check()


def test_an_end_that_nobody_answers_gives_up_in_time_and_says_so(ends):
    forever = threading.Event()
    (error,) = in_threads(lambda: ends[0].watched(forever.wait, 0.2, "sending weights"))
    forever.set()
    assert str(error) == "sending weights took more than 0.2 s (sync.timeout_s)"
    with pytest.raises(SyncFailed, match="sending weights took more"):
        ends[1].check()


def test_a_look_may_end_the_wait(ends):
    forever = threading.Event()

    def look():
        raise RuntimeError("http://a answered 400: busy")

    (error,) = in_threads(lambda: ends[0].watched(forever.wait, 50, "sending", look))
    forever.set()
    assert "http://a answered 400: busy" in str(error)


def test_parts_survive_the_store(ends, monkeypatch):
    monkeypatch.setattr(wire, "_VALUE_BYTES", 30)
    parts = [whole("model.norm.weight", (7,)), *whole("lm_head.weight", (9, 4)).halves()]
    wire.write_json(ends[0].store, "offers", wire.listed(parts))
    assert wire.parts_of(wire.read_json(ends[1].store, "offers")) == parts
