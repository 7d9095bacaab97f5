"""Row sync: weights on their way to two real servers, of which one hangs and one dies."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.platform import installed, nccl
from megatron_fp16rl.recipe import Sync
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.server import Server, ServerConfig, launch_servers
from megatron_fp16rl.rollout.weight_sync import connect
from megatron_fp16rl.rollout.weight_sync.base import SyncFailed, Transport, Weights, WeightStream
from megatron_fp16rl.tools.selftest import models
from megatron_fp16rl.tools.selftest.result import Check, NotHere, Setting, at_least, at_most, equal

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

_SERVERS, _PUBLISHES = 2, 3
_START_S, _ANSWER_S = 600, 60
_TIMEOUT_S, _GRACE_S = 10, 10
_NATS = 0.01  # rounding is below a thousandth in a model of this size; other weights are more
_MOVED = 0.05
_SEQUENCES = [[2, 3, 12, 4, 5, 13], [9, 9, 12, 3, 2, 13, 7, 7]]


def sync(setting: Setting) -> list[Check]:
    """Publishes, leaves the servers and meets them again; then a server hangs in a sync, the other dies in one."""
    if installed.version("sglang") is None:
        raise NotHere("SGLang is not installed")
    gpus = torch.cuda.device_count()
    if platform.current().NAME == "cuda" and gpus <= _SERVERS:
        raise NotHere(f"a learner and {_SERVERS} servers want {1 + _SERVERS} GPUs, {gpus} are here")
    folder = setting.folder / "model"
    models.built(folder)
    config = ServerConfig("fp16", start_timeout_s=_START_S)
    os.environ.update(nccl.agreed(config))
    # On the GPUs after the learner's.
    with launch_servers(config, folder, setting.folder / "logs", _SERVERS, 1) as servers:
        return _Syncs(folder, setting.folder, servers).run()


class _Syncs:
    """A learner that learns before each sync, so that each version has other weights."""

    def __init__(self, folder: Path, scratch: Path, servers: list[Server]) -> None:
        world = models.world()
        self.servers, self.version = servers, 0
        self.clients = [Client(server.endpoint, _ANSWER_S) for server in servers]
        self.learner: Learner = models.learner(folder, world, "fp16")
        self.batch = self.learner.share(Batch.from_token_ids(_SEQUENCES))
        self.transport: Transport = connect(
            Sync(timeout_s=_TIMEOUT_S, bucket_mib=1),  # messages of 512 KiB
            *(1, "127.0.0.1", folder, scratch, "fp16", world),
        )

    def run(self) -> list[Check]:
        both = self.clients
        before = self._learnt()
        apart = max(self.publish(both) for _ in range(_PUBLISHES))
        moved = (self._learnt() - before).abs().mean().item()
        leaving = _seconds(self.transport.close)
        began = time.monotonic()
        apart = max(apart, self.publish(both))
        meeting = time.monotonic() - began
        hung, left = self.fail(both, lambda: self._signal(1, signal.SIGSTOP))
        others = self.publish(left) if left else torch.nan
        died, none = self.fail(left, lambda: self._signal(0, signal.SIGKILL))
        limit = _TIMEOUT_S + _GRACE_S
        return [
            at_least("nats that updates moved log-probs", moved, _MOVED),
            at_most("nats between server and learner", apart, _NATS),
            at_most("seconds to leave the servers", leaving, _GRACE_S),
            at_most("seconds to meet and send again", meeting, _GRACE_S),
            at_most("seconds until a hung server ended a sync", hung, limit),
            equal("servers left then", len(left), _SERVERS - 1),
            at_most("nats, sent to these again", others, _NATS),
            at_most("seconds until a killed server ended a sync", died, limit),
            equal("servers left then, after the only one", len(none), 0),
        ]

    def publish(self, clients: Sequence[Client]) -> float:
        """After an update. Returns the mean |difference| of log-probs of the worst server."""
        self.learner.supervised_update(self.batch)
        self.version += 1
        self.transport.send(self.learner.exported, str(self.version), clients)
        ours, worst = self._learnt(), 0.0
        for client in clients:
            (answer,) = client.generate([_SEQUENCES[0]], Sampling(1))
            if answer.version != str(self.version):
                raise RuntimeError(f"{client.url} says {answer.version}, not {self.version}")
            served = torch.tensor([one for row in client.score(_SEQUENCES) for one in row])
            worst = max(worst, (served - ours).abs().mean().item())
        return worst

    def fail(
        self, clients: Sequence[Client], hurt: Callable[[], None]
    ) -> tuple[float, list[Client]]:
        """Seconds that a sync lasted in whose midst a server was hurt, and the servers that are left."""
        self.version += 1
        began = time.monotonic()
        try:
            weights = _Hurting(self.learner.exported, hurt)
            self.transport.send(weights, str(self.version), clients)
        except SyncFailed as error:
            print(error, flush=True)
        else:
            raise RuntimeError("a sync passed in whose midst a server was stopped or killed")
        seconds = time.monotonic() - began
        # Only after the except block: the error's traceback keeps the store alive in which servers wait.
        return seconds, self.transport.alive(clients)

    def _learnt(self) -> torch.Tensor:
        """[tokens]: of all tokens of all sequences but the first."""
        return self.learner.score(self.batch, 1.0).pi[self.batch.mask].cpu()

    def _signal(self, index: int, number: int) -> None:
        os.killpg(self.servers[index].process.pid, number)


class _Hurting:
    """Weights of which half are on their way when something happens."""

    def __init__(self, weights: Weights, hurt: Callable[[], None]) -> None:
        self.weights, self.hurt, self.parts, self.check = (
            weights,
            hurt,
            weights.parts,
            weights.check,
        )
        self.memory = None  # so that every tensor is asked for
        self.left = len({part.key for part in self.parts}) // 2

    def tensor(self, key: str) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            self.hurt()
        return self.weights.tensor(key)

    def whole(self, limit: int = 0) -> WeightStream:
        raise NotImplementedError("`sliced` gathers nothing")


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
