"""Weight syncs of two pipeline stages to two real servers, one of which fails at a random message."""

import contextlib
import functools
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_fp16rl.data.batch import Batch
from tests import models
from tests.workers.common import join_world

SEQUENCES = [[2, 3, 12, 4, 5, 13], [9, 9, 12, 3, 2, 13]]
FAULTS = ("none", "killed", "stopped", "refuses")


class _Servers:
    """Two servers of rank 0's, and what can happen to them."""

    def __init__(self, recipe: object, folder: str, registry: Path) -> None:
        from megatron_fp16rl.rollout.server import ServerConfig

        self.config, self.folder, self.registry = ServerConfig.of(recipe), Path(folder), registry
        self.private = Path(tempfile.mkdtemp())
        self.running: list = [None, None]

    def start(self, index: int) -> None:
        from megatron_fp16rl.rollout import server

        self.running[index] = server.start(
            self.config, self.folder, self.private, self.private, index, 0
        )

    def register(self) -> None:
        from megatron_fp16rl.rollout import discovery, server

        server.wait_until_healthy(self.running, 300, lambda line: None)
        for index, running in enumerate(self.running):
            discovery.register(self.registry, index, running.endpoint)

    def hurt(self, fault: str, index: int) -> None:
        process = self.running[index].process
        if fault == "killed":
            os.killpg(process.pid, signal.SIGKILL)
        elif fault == "stopped":
            os.killpg(process.pid, signal.SIGSTOP)
        elif fault == "refuses":  # somebody else closes its update: it takes no more of it
            from megatron_fp16rl.rollout.client import Client

            client = Client(self.running[index].endpoint, 60)
            # From a thread: it answers only when the message that it waits for has come.
            _in_background(lambda: client.post("/end_weight_update", {}, admin=True))

    def mend(self, fault: str, index: int) -> None:
        """Has it back, and tells the learner where it is."""
        if fault == "stopped":
            os.killpg(self.running[index].process.pid, signal.SIGCONT)
        if fault == "killed":
            self.running[index].process.wait()
            self.start(index)
            self.register()

    def close(self) -> None:
        from megatron_fp16rl.rollout import server

        server.stop_servers([one for one in self.running if one])


def _in_background(work: Callable[[], object]) -> None:
    import threading

    def quietly() -> None:
        with contextlib.suppress(RuntimeError):
            work()

    threading.Thread(target=quietly, daemon=True).start()


def survive(folder: str, transport: str, syncs: int, seed: int, timeout_s: float) -> list[dict]:
    """What came of each sync; rank 0 starts the servers, and stops them."""
    import torch
    from transformers import AutoTokenizer

    from megatron_fp16rl.data.tasks import make
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.rollout.rollouts import Rollouts

    world = join_world(ranks=2, pipeline_parallel=2)
    registry = Path(folder).parent / "registry"
    recipe = models.recipe(
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5, "servers": 2},
        learner={"ranks": 2, "pipeline_parallel": 2, "global_batch_size": 8},
        sync={"transport": transport, "timeout_s": timeout_s},
    )
    learner = Learner.from_recipe(recipe, folder, world)
    task = make(recipe.task, AutoTokenizer.from_pretrained(folder), seed=0)
    chance, servers = random.Random(seed), _Servers(recipe, folder, registry)
    with contextlib.ExitStack() as stack:
        if world.is_rank0:
            stack.callback(servers.close)
            registry.mkdir(exist_ok=True)
            for index in range(2):
                servers.start(index)
            servers.register()
        torch.distributed.barrier()
        rollouts = Rollouts(recipe, task, world, registry, Path(folder), registry)
        sender = rollouts.publisher.transport
        if transport == "sliced":
            sender.limit = 10_000
        elif sender.sender is not None:
            sender.sender.bucket_bytes = 10_000
        rows = []
        for version in range(syncs):
            fault, victim, when = chance.choice(FAULTS), chance.randrange(2), chance.random()
            _change(learner, version)
            hurt = functools.partial(servers.hurt, fault, victim)
            weights = _Hurting(learner.exported, when, hurt)
            weights.hurts = world.is_rank0 and fault != "none"
            began = time.monotonic()
            rollouts.publish(weights, version)
            took = time.monotonic() - began
            if weights.has_hurt:
                servers.mend(fault, victim)
            learnt = learner.score(Batch.from_token_ids(SEQUENCES)).pi_logprobs
            clients = rollouts.pool.clients if world.is_rank0 else []
            row = {"fault": fault if weights.has_hurt else "none", "seconds": took}
            rows.append(row | _served(clients, str(version), learnt))
            torch.distributed.barrier()
    return rows


def _change(learner: object, version: int) -> None:
    """Gives the model the weights of a version, far from those of all others."""
    import torch

    with torch.no_grad():
        for shard in learner.model.weights:
            # The same on both stages for an embedding of which each has a copy.
            name = learner.model.canonical_name(shard.name)
            seed = random.Random(f"{version} {name}").getrandbits(60)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(shard.parameter.shape, generator=generator)
            shard.parameter.copy_(noise * 0.05 + shard.name.endswith("norm.weight"))


def _served(clients: list, version: str, learnt: object) -> dict:
    """How many servers there are, and whether they serve a version with the learner's log-probs."""
    from megatron_fp16rl.rollout.client import Sampling
    from megatron_fp16rl.rollout.weight_sync.publisher import largest

    apart, versions = [0.0], []
    for client in clients:
        (answer,) = client.generate([[2, 3]], Sampling(1))
        versions.append(answer.version)
        for row, ids, ours in zip(client.score(SEQUENCES), SEQUENCES, learnt, strict=True):
            both = zip(row, ours[1 : len(ids)].tolist(), strict=True)
            apart += [abs(a - b) for a, b in both]
    right = versions == [version] * len(versions)
    return {"servers": len(versions), "right": right, "apart": largest(apart)}


class _Hurting:
    """Weights that hurt a server once, when a share `when` of the tensors is on its way."""

    def __init__(self, weights: object, when: float, hurt: Callable[[], None]) -> None:
        self.weights, self.hurt, self.number = weights, hurt, 0
        self.parts, self.check = weights.parts, weights.check
        self.memory = None  # so that every sync asks for every tensor
        self.at = int(when * len({part.key for part in self.parts}))
        self.hurts, self.has_hurt = False, False

    def _count(self) -> None:
        if self.hurts and self.number == self.at:
            self.hurts, self.has_hurt = False, True
            self.hurt()
        self.number += 1

    def tensor(self, key: str) -> object:
        self._count()
        return self.weights.tensor(key)

    def whole(self, *limit: int) -> object:
        for item in self.weights.whole(*limit):
            self._count()
            yield item
