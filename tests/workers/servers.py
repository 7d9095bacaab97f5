"""Learners with real rollout servers."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from megatron_fp16rl.data.batch import Batch
from tests import models
from tests.workers.common import fp16_recipe, join_world, noisy


def _hurry(sender: object, update: Callable) -> None:
    """Has it wait for a server not much longer than this machine needs, busy as it is, to meet and update."""
    sender.close()
    began = time.monotonic()
    update()
    sender.timeout_s = max(4, 10 * (time.monotonic() - began))
    sender.close()  # the next group has it as well


class _Pair:
    """Two leaders and two servers, of which one, the victim, can be stopped; no supervisor."""

    def __init__(self, endpoints: list[dict], victim: int, folder: str, registry: str) -> None:
        from transformers import AutoTokenizer

        from megatron_fp16rl.data.tasks import make
        from megatron_fp16rl.models.folder import HFFolder
        from megatron_fp16rl.rollout.discovery import Endpoint, register
        from megatron_fp16rl.rollout.rollouts import Rollouts

        self.world, self.victim, here = join_world(ranks=2), victim, Path(registry)
        recipe = models.recipe(
            rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5, "servers": 2},
            learner={"ranks": 2, "global_batch_size": 8},
            sync={"timeout_s": 60},
        )
        if self.world.is_rank0:
            for index, endpoint in enumerate(endpoints):
                register(here, index, Endpoint(**endpoint))
        task = make(recipe.task, AutoTokenizer.from_pretrained(folder), seed=0)
        self.rollouts = Rollouts(recipe, task, self.world, here, Path(folder), here)
        self.folder = HFFolder(folder)
        self.noisy = False  # whether to publish other weights than the folder's
        self.on_read: Callable = lambda: None  # before a tensor is sent

    def publish(self) -> list[str]:
        """The servers that have the weights then."""
        from megatron_fp16rl.rollout.weight_sync.base import WholeWeights

        tensors: dict = dict(noisy(self.folder)) if self.noisy else {}

        def read(name: str) -> object:
            self.on_read()
            return tensors.get(name, self.folder.read(name))

        names = self.folder.names() if self.world.is_rank0 else []
        shapes = {name: tuple(self.folder.read(name).shape) for name in names}
        weights = WholeWeights(shapes, read)
        self.rollouts.publish(weights, (self.rollouts.publisher.version or 0) + 1)
        return self.served()

    def served(self) -> list[str]:
        import torch

        from megatron_fp16rl.rollout.client import Sampling

        clients = self.rollouts.pool.clients
        for client in clients:
            (answer,) = client.generate([[2, 3]], Sampling(1))
            assert answer.version == str(self.rollouts.publisher.version), client.url
        torch.distributed.barrier()
        return [client.url for client in clients]

    def scores(self) -> list[float]:
        """Log-probs of a sequence on every server."""
        return [client.score([[2, 3, 12, 4, 5, 13]])[0] for client in self.rollouts.pool.clients]

    def awake(self) -> list[str]:
        """Wakes the victim and publishes until it has the weights."""
        import torch

        if self.world.is_rank0:
            os.killpg(self.victim, signal.SIGCONT)
        torch.distributed.barrier()
        for _ in range(100):  # one that is late waits for the next
            if len(urls := self.publish()) == 2:
                break
            time.sleep(1)
        return urls

    def stopping(self, method: Callable, at: int) -> Callable:
        """The method, which stops the victim first when it is called for the `at`-th time."""
        calls = []

        def call(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) == at:
                os.killpg(self.victim, signal.SIGSTOP)
            return method(*arguments)

        return call

    def lose_all(self, times: int) -> None:
        """The second leader loses its servers as often as it is given some, so many times."""
        pool, given = self.rollouts.pool, []
        set_servers = type(pool).set_servers

        def call(endpoints: list) -> None:
            set_servers(pool, endpoints)
            given.append(endpoints)
            if self.world.rank == 1 and len(given) <= times:
                for client in pool.clients:
                    client._http.base_url = "http://127.0.0.1:1"  # where nobody listens

        pool.clients = []
        pool.set_servers = call
        call(self.rollouts.publisher.members)


def pool_faults(endpoints: list[dict], victim: int, folder: str, registry: str) -> dict:
    """One server is stopped in an update to other weights, and comes back.

    Then one leader loses all of its servers in mid-collection, once; and then again and again. At last one
    is stopped just before an update: it was asked to join a group that nobody is in when it wakes.
    """
    from megatron_fp16rl.rollout.weight_sync.publisher import ServersGone

    pair = _Pair(endpoints, victim, folder, registry)
    rollouts, sender = pair.rollouts, pair.rollouts.publisher.transport
    result = {"both": pair.awake()}
    original = pair.scores()[0]
    if pair.world.is_rank0:
        _hurry(sender, pair.publish)
        sender.limit = 20_000
        pair.on_read = pair.stopping(lambda: None, 9)
    else:
        pair.publish()
    pair.noisy = True
    result["stopped in an update"] = pair.publish()
    (after_it,) = pair.scores()
    result["awake"] = pair.awake()
    undisturbed = pair.scores()
    result["scores"] = [original, after_it, *undisturbed]
    pair.lose_all(1)
    batch, metrics = rollouts.collect(0)
    result["groups"] = batch.groups.tolist()
    result["resent"] = metrics["rollout/resent_requests"]
    result["one leader had none"] = pair.served()
    # While the learner learns, that leader loses them again: it samples on from the learner's newer weights.
    version = rollouts.publisher.version
    pair.lose_all(1)
    rollouts.begin(1)
    rollouts.finish(version + 1)
    ahead, _ = rollouts.collect(1)
    result["newer than begun with"] = (ahead.versions[ahead.mask] - version).unique().tolist()
    result["served ahead"] = pair.served()
    pair.lose_all(100)
    try:
        rollouts.collect(2)
    except ServersGone as error:
        result["hopeless"] = str(error)
    del rollouts.pool.set_servers  # nobody loses any more
    rollouts.pool.clients = []
    if pair.world.is_rank0:
        sender.close()
        sender._open = pair.stopping(sender._open, 1)
    result["stopped before the group was made"] = pair.publish()
    result["awake again"] = pair.awake()
    return result


def late_server(folder: str, like: str) -> None:
    """Under a watchdog of 4 seconds: two ranks wait 6 for a server, and then hang."""
    import threading

    from transformers import AutoTokenizer

    from megatron_fp16rl.data.tasks import make
    from megatron_fp16rl.rollout.discovery import Endpoint, register
    from megatron_fp16rl.rollout.rollouts import Rollouts
    from megatron_fp16rl.utils.watchdog import Watchdog

    world, here = join_world(ranks=2), Path(folder)
    recipe = models.recipe(learner={"ranks": 2, "global_batch_size": 8}, sync={"transport": "disk"})
    task = make(recipe.task, AutoTokenizer.from_pretrained(like), seed=0)

    def report(reason: str, where: str) -> None:
        (here / f"rank_{world.rank}").write_text(reason)
        os._exit(86)  # as it does itself, when others have shown their stacks

    watchdog = Watchdog(4, here / "hung", report)
    rollouts = Rollouts(recipe, task, world, here, Path(like), here, watchdog.waiting)
    watchdog.beat("the first sync")
    if world.is_rank0:
        late = Endpoint("http://127.0.0.1:1", "", "")
        threading.Timer(6, register, (here, 0, late)).start()
    assert len(rollouts.publisher._find_servers()) == 1
    (here / f"found_{world.rank}").touch()
    time.sleep(600)


def serve_learnt(
    endpoint: dict, ranks_per_server: int, folder: str, layout: dict, sequences: list[list[int]]
) -> dict:
    """Sends a learner's weights to a server by two transports, in tiny messages.

    Returns the learner's log-probs, and of each transport the bytes sent and the server's checksums.
    """
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.recipe import Sync
    from megatron_fp16rl.rollout.client import Client
    from megatron_fp16rl.rollout.discovery import Endpoint
    from megatron_fp16rl.rollout.weight_sync import connect

    world, here = join_world(**layout), Path(folder)
    learner = Learner.from_recipe(fp16_recipe(world.layout), folder, world)
    client = Client(Endpoint(**endpoint), 60)
    result: dict = {"sent": [], "checksums": []}
    for transport in ("sliced", "distributed"):
        settings = Sync(transport=transport, timeout_s=60)
        sender = connect(settings, ranks_per_server, "127.0.0.1", here, here, "fp16", world)
        if transport == "sliced":
            sender.limit = 1_000  # nearly every tensor in messages of its own
        elif world.is_rank0:
            sender.sender.bucket_bytes = 1_000
        clients = [client] if world.is_rank0 else []
        result["sent"].append(sender.send(learner.exported, "31", clients))
        if world.is_rank0:
            answer = client.post("/weights_checker", {"action": "checksum"}, admin=True)
            result["checksums"].append(answer)
        sender.close()
    scores = learner.score(Batch.from_token_ids(sequences)).pi_logprobs
    rows = zip(scores, sequences, strict=True)
    return result | {"scores": [row[1 : len(ids)].tolist() for row, ids in rows]}


def fp16rl(arguments: list[str]) -> str:
    """What a command prints in a rank, of those that torchrun could have started."""
    import contextlib
    import io

    from megatron_fp16rl.cli import app

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        app(arguments, standalone_mode=False)
    return printed.getvalue()
