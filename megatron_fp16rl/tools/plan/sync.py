"""Time of a weight sync, hop by hop, for each transport; docs/planner.md has it in words.

Bytes, messages and pieces are counted; what one of them costs is assumed or was measured on a CPU, as said below.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_fp16rl.models.costs import Costs
from megatron_fp16rl.recipe import Layout, Recipe
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.servers import BYTES, expert_parallel, rank_weights

# Measured on 2 busy CPU cores, SGLang 0.5.23, 6,290 tensors of a small mixture of experts, 50 buckets against 1:
JOIN_S = 40e-6  # rank 0, of a tensor: joins shards and cuts them by Hugging Face's names, in Python
LOAD_S = 50e-6  # a server, of a tensor: SGLang's load_weights
REQUEST_S = 10e-3  # one HTTP request to all servers, until each has answered
# Assumed. A message: NCCL's latency over several nodes (75 us of a small all-reduce), events, Python. A piece, by
# torch._foreach_copy_, which launches a kernel for each that is strided: PyTorch's own part is 0.6 us on a CPU.
MESSAGE_S, PIECE_S = 0.2e-3, 5e-6
DISK = 2e9  # bytes a second that one node writes to, or reads from, a shared file system
TENSORS = 9  # of a layer, beside its experts; each of those has three


@dataclass(frozen=True)
class WeightSync:
    """Of one sync. parts: seconds, which add up."""

    senders: int  # learner ranks that send to servers
    groups: int  # process groups that a server rank is in
    sender_bytes: int  # out of the one that sends most
    server_rank_bytes: int  # into each server rank
    messages: int  # into each server rank
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def weight_sync(recipe: Recipe, model: Costs, gpu: Gpu) -> WeightSync:
    """The sync of a recipe's weights from its learner into its servers, by its transport. gpu: the speeds that it reaches."""
    by_transport: dict[str, Callable[[Recipe, Costs, Gpu], WeightSync]] = {
        "sliced": _sliced,
        "distributed": _distributed,
        "disk": _disk,
    }
    return by_transport[recipe.sync.transport](recipe, model, gpu)


def stages(model: Costs, layout: Layout) -> list[Costs]:
    """The model cut as its pipeline is. An embedding is where it is used; dense layers come first."""
    uneven = layout.uneven_stages
    even = layout.pipeline_parallel - len(uneven)
    share, more = divmod(model.layers - sum(uneven.values()), max(1, even))
    sizes = [share + (i < more) for i in range(even)]
    if "first_stage_layers" in uneven:
        sizes.insert(0, uneven["first_stage_layers"])
    if "last_stage_layers" in uneven:
        sizes.append(uneven["last_stage_layers"])
    dense, cut = model.layers - model.sparse_layers, []
    for layers in sizes:
        here = min(dense, layers)
        dense -= here
        # tied: one matrix, which `embedding` counts.
        stage = replace(model, layers=layers, sparse_layers=layers - here, embedding=0, tied=True)
        cut.append(stage)
    cut[0] = replace(cut[0], embedding=model.embedding)
    if not model.tied:
        cut[-1] = replace(cut[-1], embedding=cut[-1].embedding + model.embedding)
    return cut


# Transport `sliced`: every learner rank to every server rank, only what that rank keeps


@dataclass(frozen=True)
class Load:
    """What one GPU has to do in a sync, of a stage or of all."""

    bytes: float = 0.0
    messages: float = 0.0
    pieces: float = 0.0  # one copy each, into a message or out of it

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.bytes + other.bytes, self.messages + other.messages, self.pieces + other.pieces
        )

    def __mul__(self, times: float) -> "Load":
        return Load(self.bytes * times, self.messages * times, self.pieces * times)

    def parts(self, speed: float, memory: float) -> dict[str, float]:
        """Seconds. A message is on the wire, then copied, then comes the next: nothing overlaps."""
        return {
            "wire": self.bytes / speed,
            "copies": 2 * self.bytes / memory + self.pieces * PIECE_S,
            "messages": self.messages * MESSAGE_S,
        }


def into_server_rank(recipe: Recipe, stage: Costs) -> tuple[Load, int]:
    """What a server rank gets of one stage, and from how many of its learner ranks at most.

    Of what SGLang splits a rank gets its part, of what it repeats the whole. Data-parallel replicas share
    the sending, so that all ranks of a stage send the same.
    """
    layout, parts, experts = recipe.learner, recipe.rollout.tensor_parallel, expert_parallel(recipe)
    sharing = parts // experts or 1  # server ranks that share an expert
    size = rank_weights(stage, parts, stage.experts) * BYTES[recipe.precision.served]
    # A slice overlaps the shards of so many ranks along TP and ETP, and each of those brings a piece.
    dense = max(1.0, layout.tensor_parallel / parts)
    expert = max(1.0, layout.expert_tensor_parallel / sharing)
    pieces = TENSORS * stage.layers * dense
    pieces += 3 * stage.sparse_layers * stage.experts / experts * expert
    holders = dense / layout.tensor_parallel  # as a share of the stage's ranks
    if stage.sparse_layers:
        of_experts = max(1 / layout.expert_parallel, 1 / experts)
        holders += of_experts * expert / layout.expert_tensor_parallel
    senders = max(1, round(min(1.0, holders) * layout.ranks / layout.pipeline_parallel))
    limit = recipe.sync.message_bytes
    messages = senders * math.ceil(size / senders / limit)
    return Load(size, messages, pieces), senders


def _sliced(recipe: Recipe, model: Costs, gpu: Gpu) -> WeightSync:
    """Senders and server ranks work in pairs, in rounds: the one that has most to do is the bound."""
    layout, parts = recipe.learner, recipe.rollout.tensor_parallel
    per_stage = layout.ranks // layout.pipeline_parallel
    speed, cut = _between(recipe, gpu), stages(model, layout)
    received = [into_server_rank(recipe, stage) for stage in cut]
    server_rank = sum((load for load, _ in received), Load())
    sent = [load * (parts / per_stage) for load, _ in received]

    def seconds(load: Load) -> dict[str, float]:
        return load.parts(speed, gpu.hbm)

    # In a round all wait for the pair that has most to move. While server ranks are in a stage that sends
    # less, some are still in one that sends more.
    pairs = [(sum(seconds(load * (1 / senders)).values()), senders) for load, senders in received]
    longest = max(pair for pair, _ in pairs)
    waits = sum((longest - s) * min(n, parts * n / per_stage - 1) for s, n in pairs)
    receiving = {**seconds(server_rank), "waits": waits}
    slowest = max((receiving, *map(seconds, sent)), key=lambda each: sum(each.values()))
    # begin, the command and end; the range check reads the weights once; servers repack what they loaded
    fixed = 3 * REQUEST_S + (_largest_shard(recipe, cut) + 2 * server_rank.bytes) / gpu.hbm
    return WeightSync(
        senders=layout.ranks,
        groups=sum(senders for _, senders in received),
        sender_bytes=int(max(load.bytes for load in sent)),
        server_rank_bytes=int(server_rank.bytes),
        messages=round(server_rank.messages),
        parts={**slowest, "fixed": fixed},
    )


# Transports that gather to rank 0


def _distributed(recipe: Recipe, model: Costs, gpu: Gpu) -> WeightSync:
    """Gathered, then broadcast bucket by bucket to all ranks of all servers, which load whole tensors.

    Nothing overlaps: rank 0 waits for the servers' answer before it takes the next tensor, and a stage's
    leader for rank 0.
    """
    size = model.parameters * BYTES[recipe.precision.served]
    buckets = math.ceil(size / ((recipe.sync.bucket_mib << 20) // 3))
    broadcast = size / _between(recipe, gpu) + buckets * (MESSAGE_S + REQUEST_S)
    load = LOAD_S * _tensors(model)
    parts = {**_gathered(recipe, model, gpu), "broadcast": broadcast, "load": load}
    fixed = 2 * REQUEST_S + _largest_shard(recipe, stages(model, recipe.learner)) / gpu.hbm
    return WeightSync(1, 1, size, size, buckets, {**parts, "fixed": fixed})


def _disk(recipe: Recipe, model: Costs, gpu: Gpu) -> WeightSync:
    """Gathered; rank 0 writes, then all nodes of servers read at once."""
    size = model.parameters * BYTES[recipe.precision.served]
    parts = {"disk": 2 * size / DISK, "load": LOAD_S * _tensors(model)}
    return WeightSync(1, 0, size, size, 0, {**_gathered(recipe, model, gpu), **parts})


def _gathered(recipe: Recipe, model: Costs, gpu: Gpu) -> dict[str, float]:
    """Seconds to rank 0: along TP and EP to a stage's leader, then between leaders."""
    layout, width = recipe.learner, BYTES[recipe.precision.served]
    limit = (recipe.sync.bucket_mib << 20) // 3
    expert_ranks = layout.expert_parallel * layout.expert_tensor_parallel
    along, leaders = 0.0, 0.0
    for i, stage in enumerate(stages(model, layout)):
        experts = stage.sparse_layers * stage.experts * stage.expert * width
        dense = stage.parameters * width - experts
        for size, ranks in ((dense, layout.tensor_parallel), (experts, expert_ranks)):
            # Of a group's consecutive ranks a node holds some; the leader has its own part already.
            near = min(ranks, gpu.per_node)
            along += size * (near - 1) / ranks / gpu.link
            along += size * (ranks - near) / ranks / gpu.network
        # Packed layer by layer, each type of weight along its axis.
        messages = stage.layers + stage.sparse_layers * math.ceil(
            experts / max(1, stage.sparse_layers) / limit
        )
        along += messages * MESSAGE_S
        if i:
            apart = layout.ranks > gpu.per_node
            leaders += (dense + experts) / (gpu.network if apart else gpu.link)
            leaders += messages * MESSAGE_S
    return {"gather": along, "to_rank0": leaders, "join": JOIN_S * _tensors(model)}


def _tensors(model: Costs) -> int:
    """As Hugging Face names them, but for embeddings."""
    return TENSORS * model.layers + 3 * model.sparse_layers * model.experts


def _between(recipe: Recipe, gpu: Gpu) -> float:
    """Bytes a second from a learner rank to a server rank."""
    rollout = recipe.rollout
    gpus = recipe.learner.ranks + rollout.servers * rollout.tensor_parallel
    return gpu.network if gpus > gpu.per_node else gpu.link


def _largest_shard(recipe: Recipe, cut: list[Costs]) -> float:
    """Bytes of the weights that the fullest learner rank holds."""
    layout, width = recipe.learner, BYTES[recipe.precision.served]
    sizes = []
    for stage in cut:
        experts = stage.sparse_layers * stage.experts * stage.expert
        dense = (stage.parameters - experts) / layout.tensor_parallel
        sizes.append(dense + experts / (layout.expert_parallel * layout.expert_tensor_parallel))
    return max(sizes) * width
