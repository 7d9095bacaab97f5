"""Time of a step: rooflines of learner, rollouts and weight sync. docs/planner.md has the formulas.

The functions below `estimate` know nothing of recipes, so they can describe other systems' runs too.
"""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_fp16rl.data.micro_batches import group_by_length, padded_shapes, split_until
from megatron_fp16rl.recipe import AdditionTask, Recipe
from megatron_fp16rl.rollout.pool import CHUNKS, IN_FLIGHT
from megatron_fp16rl.tools.plan.arithmetic import Costs, causal_pairs, costs
from megatron_fp16rl.tools.plan.decoding import Lengths, Rollout, Servers, response_lengths, rollout
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.lengths import length_multiple, longest
from megatron_fp16rl.tools.plan.rates import SHIPPED, Efficiencies
from megatron_fp16rl.tools.plan.servers import BYTES, server_memory

MEAN_SHARE = 0.5  # of max_new_tokens that responses have on average, where nothing else is known
PROMPT_SHARE = 0.25  # of the longest prompt that prompts have on average
# Assumed: rank 0's work on one tensor of an export: gather, send, receive, Python. An expert of a layer
# is three tensors.
_TENSOR_S = 100e-6
# Assumed: what one node writes to, or reads from, a file system that the cluster shares.
_DISK_GBPS = 2.0

Way = Literal["link", "network", "disk"]


@dataclass(frozen=True)
class Team:
    """The learner's ranks, in Megatron's words. context_parallel describes other systems' runs only.

    length_multiple   tokens of which a padded sequence is a multiple
    trains_all        False: adapters alone are trained
    """

    ranks: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    model_chunks: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    context_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    micro_batch_tokens: int = 8192
    length_multiple: int = 1
    recompute: bool = False
    distributed_optimizer: bool = False
    trains_all: bool = True

    @property
    def data_parallel(self) -> int:
        shards = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        return max(1, self.ranks // shards)


@dataclass(frozen=True)
class Step:
    """What a step does: samples, forward passes that score them, optimizer updates."""

    sequences: int
    prompts: int
    lengths: Lengths
    updates: int = 1
    scorings: int = 1


@dataclass(frozen=True)
class Times:
    """Seconds of a step on policy, one part after the other, which is how this repository's loop runs.

    one_step_off_s        as it would be if rollouts went on while the learner learns from those before
    tokens_per_s_per_gpu  prompts and responses, over the learner's and the servers' GPUs
    breakdown             what the parts are made of, for people to read; seconds unless the name says else
    """

    step_s: float
    rollout_s: float
    score_s: float
    update_s: float
    sync_s: float
    one_step_off_s: float
    tokens_per_s_per_gpu: float
    breakdown: dict[str, float]


def estimate(
    recipe: Recipe,
    config: object,
    gpu: Gpu,
    mean_tokens: float | None = None,
    rates: Efficiencies = SHIPPED,
) -> Times:
    """The times of a recipe's steps.

    config: the model's transformers configuration. mean_tokens: of responses; by default half of
    rollout.max_new_tokens.
    """
    model, width = costs(config), BYTES[recipe.precision.served]
    settings, team, step = recipe.rollout, team_of(recipe), step_of(recipe, mean_tokens)
    servers = servers_of(recipe, config, gpu)
    made = rollout(model, servers, step.lengths, step.sequences, step.prompts, width, gpu, rates)
    near = _as_learners_have_it(recipe, gpu)
    learnt = learner(model, team, step, near, rates)
    sync = publish(model, team, _way(recipe, gpu), width, near, rates)
    score, update = learnt["score"], learnt["update"]
    total = made.seconds + score + update + sync
    gpus = team.ranks + settings.servers * settings.tensor_parallel
    tokens = step.sequences * (step.lengths.prompt + step.lengths.mean)
    return Times(
        step_s=total,
        rollout_s=made.seconds,
        score_s=score,
        update_s=update,
        sync_s=sync,
        one_step_off_s=max(made.seconds, score + update) + sync,
        tokens_per_s_per_gpu=tokens / total / gpus,
        breakdown={**_of_rollout(made, step), **learnt},
    )


def _of_rollout(made: Rollout, step: Step) -> dict[str, float]:
    return {
        "mean_prompt_tokens": step.lengths.prompt,
        "mean_response_tokens": step.lengths.mean,
        "prefill": made.prefill_s,
        "decode": made.decode_s,
        "decode_tail": made.tail_s,
        "decode_batch": made.batch,
        "decode_queued": float(made.queued),
    }


def step_of(recipe: Recipe, mean_tokens: float | None = None) -> Step:
    """What a recipe's step does."""
    settings, most = recipe.rollout, longest(recipe)
    sequences = settings.prompts * settings.samples
    is_exact = isinstance(recipe.task, AdditionTask)
    return Step(
        sequences=sequences,
        prompts=settings.prompts,
        lengths=Lengths(
            prompt=most.prompt if is_exact else max(1, round(most.prompt * PROMPT_SHARE)),
            mean=min(most.response, mean_tokens or MEAN_SHARE * most.response),
            most=most.response,
        ),
        updates=sequences // recipe.learner.global_batch_size,
        scorings=1 if recipe.algorithm.kl is None else 2,
    )


def team_of(recipe: Recipe) -> Team:
    """A recipe's learner."""
    learner = recipe.learner
    return Team(
        ranks=learner.ranks,
        tensor_parallel=learner.tensor_parallel,
        pipeline_parallel=learner.pipeline_parallel,
        model_chunks=learner.model_chunks,
        first_stage_layers=learner.first_stage_layers,
        last_stage_layers=learner.last_stage_layers,
        expert_parallel=learner.expert_parallel,
        expert_tensor_parallel=learner.expert_tensor_parallel,
        micro_batch_tokens=learner.micro_batch_tokens,
        length_multiple=length_multiple(recipe),
        recompute=learner.megatron.get("recompute_granularity") == "full",
        distributed_optimizer=learner.distributed_optimizer,
        trains_all=learner.lora is None,
    )


def servers_of(recipe: Recipe, config: object, gpu: Gpu) -> Servers:
    """A recipe's servers. Each data-parallel leader keeps some of its requests under way."""
    settings, memory = recipe.rollout, server_memory(recipe, config, gpu)
    leaders, several = recipe.learner.data_parallel, settings.servers > 1
    mine = settings.prompts * settings.samples // leaders
    return Servers(
        count=settings.servers,
        parts=settings.tensor_parallel,
        kv_tokens=memory.kv_tokens,
        max_running=max(1, memory.max_running),
        token_bytes=memory.token_bytes,
        job=max(1, -(-mine // (settings.servers * CHUNKS))) if several else 0,
        under_way=leaders * IN_FLIGHT if several else 1,
    )


def _as_learners_have_it(recipe: Recipe, gpu: Gpu) -> Gpu:
    """The GPU, with as many in a node as Slurm starts learner ranks there (launch/slurm.py)."""
    if recipe.slurm is None:
        return gpu
    return replace(gpu, per_node=-(-recipe.learner.ranks // recipe.slurm.learner_nodes))


def _way(recipe: Recipe, gpu: Gpu) -> Way:
    """From rank 0 to the servers: over the network where some of them are not on its node."""
    if recipe.sync.transport == "disk":
        return "disk"
    gpus = recipe.learner.ranks + recipe.rollout.servers * recipe.rollout.tensor_parallel
    apart = recipe.slurm is not None and recipe.slurm.rollout_nodes > 0
    return "network" if apart or gpus > gpu.per_node else "link"


def stage_layers(model: Costs, team: Team) -> list[float]:
    """Layers of each pipeline stage, as Megatron divides them: in all of a stage's chunks."""
    stages = team.pipeline_parallel
    ends = {0: team.first_stage_layers, stages - 1: team.last_stage_layers}
    given = {stage: layers for stage, layers in ends.items() if layers is not None}
    rest = (model.layers - sum(given.values())) / max(1, stages - len(given))
    return [given.get(stage, rest) for stage in range(stages)]


def stage_weights(model: Costs, team: Team) -> list[tuple[float, float]]:
    """Parameters of each pipeline stage, on all of its ranks: those of experts last, apart.

    As if every layer were the mean one. The embedding is the first stage's, the output layer the last's.
    """
    ends = model.embedding * (1 if model.tied else 2)
    experts = model.sparse_layers * model.experts * model.expert
    layers = stage_layers(model, team)
    found = [
        ((model.parameters - experts - ends) * n / model.layers, experts * n / model.layers)
        for n in layers
    ]
    for stage in [0] if model.tied else [0, len(layers) - 1]:
        found[stage] = (found[stage][0] + model.embedding, found[stage][1])
    return found


def learner(
    model: Costs, team: Team, step: Step, gpu: Gpu, rates: Efficiencies
) -> dict[str, float]:
    """Seconds of scoring and updating in a step, and what they are made of.

    Scoring runs over a rank's sequences at once, an update over its share of a batch.
    """
    forward = _Passes(1, 1, 1)
    again = 1 if team.recompute else 0
    both = _Passes((3 if team.trains_all else 2) + again, 2 + again, 2 + again)
    mine = step.sequences // team.data_parallel
    scored = _run(model, team, step, max(1, mine), forward, gpu, rates)
    batch = max(1, mine // step.updates)
    learnt = _run(model, team, step, batch, both, gpu, rates)
    reduce, optimizer = _end_of_update(model, team, gpu, rates)
    update = step.updates * (sum(learnt.values()) + reduce + optimizer)
    parts = {f"update_{name}": step.updates * value for name, value in learnt.items()}
    return {
        "score": step.scorings * sum(scored.values()),
        "update": update,
        **parts,
        "update_data_parallel": step.updates * reduce,
        "update_optimizer": step.updates * optimizer,
        "micro_batches": float(len(micro_batches(model, team, step, batch))),
    }


@dataclass(frozen=True)
class _Passes:
    """Forwards that a run costs: its kernels, its tensor-parallel and its expert-parallel exchanges."""

    compute: int
    tensor: int
    expert: int


def micro_batches(model: Costs, team: Team, step: Step, sequences: int) -> list[tuple[int, int]]:
    """(rows, tokens of a row) of a rank's micro-batches, as Forward.micro_batches has them.

    Interleaved stages are given equal shapes, all as long as the longest sequence, and a multiple of
    the stages of them.
    """
    responses = response_lengths(step.lengths.mean, step.lengths.most, sequences)
    lengths = [step.lengths.prompt + response for response in responses]  # in order
    interleaved, stages = team.model_chunks > 1, team.pipeline_parallel
    parts = group_by_length(lengths, team.micro_batch_tokens, team.length_multiple, interleaved)
    if interleaved:
        parts = split_until(parts, lengths, -(-len(parts) // stages) * stages)
    return padded_shapes(parts, lengths, team.length_multiple, interleaved)


def _run(
    model: Costs,
    team: Team,
    step: Step,
    sequences: int,
    passes: _Passes,
    gpu: Gpu,
    rates: Efficiencies,
) -> dict[str, float]:
    """Seconds of a rank that runs so many sequences through its pipeline, by what they go to.

    The slowest stage sets the pace: the first, the last, which has the output layer, or any between.
    """
    shapes = micro_batches(model, team, step, sequences)
    layers = stage_layers(model, team)
    kinds = dict.fromkeys((n, i == len(layers) - 1) for i, n in enumerate(layers))
    runs = []
    for kind in kinds:
        each = [_forward(model, team, rows, seq, *kind, gpu, rates) for rows, seq in shapes]
        runs.append(
            {
                "compute": passes.compute * sum(f["compute"] for f in each),
                "launch": passes.compute * sum(f["launch"] for f in each),
                "tensor_parallel": passes.tensor * sum(f["tensor"] for f in each),
                "expert_parallel": passes.expert * sum(f["expert"] for f in each),
            }
        )
    total = max(runs, key=lambda parts: sum(parts.values()))
    # The last stage waits for the first micro-batch, the first for the last: as long as
    # (stages - 1) / chunks of them take, and as a mean one takes.
    waits = (team.pipeline_parallel - 1) / team.model_chunks
    return {**total, "bubble": sum(total.values()) / len(shapes) * waits}


def _forward(
    model: Costs,
    team: Team,
    rows: int,
    seq: int,
    layers: float,
    is_last: bool,
    gpu: Gpu,
    rates: Efficiencies,
) -> dict[str, float]:
    """Seconds of one micro-batch's forward through a pipeline stage of so many layers.

    is_last: it has the output layer as well. `launch` is what layers with experts take more than their
    kernels need, where these are quick.
    """
    shards, share = team.tensor_parallel * team.context_parallel, layers / model.layers
    tokens, sparse = rows * seq, model.sparse_layers * share
    flops = tokens * model.layer_flops + model.attention_flops(rows * causal_pairs(seq))
    speed = shards * gpu.flops * rates.gemm
    body = flops * share / speed
    compute = body + (tokens * model.output_flops / speed if is_last else 0.0)
    launch = max(0.0, sparse * rates.launch_s - body * sparse / layers)
    moved = tokens / team.context_parallel * model.hidden * 2  # bytes of hidden states, fp16
    dense = (
        2 * layers * (1 if model.experts else 2)
    )  # gather and scatter: attention's, and an MLP's
    tensor = dense * _exchange(moved, team.tensor_parallel, 1, gpu, rates)
    sent = tokens / shards * model.top_k * model.hidden * 2
    expert = 2 * sparse * _all_to_all(sent, team, gpu, rates)
    return {"compute": compute, "launch": launch, "tensor": tensor, "expert": expert}


def _exchange(moved: float, members: int, stride: int, gpu: Gpu, rates: Efficiencies) -> float:
    """Seconds of an all-gather or reduce-scatter in a ring.

    moved: bytes of the whole. stride: distance of neighbouring members in ranks. A ring over several
    nodes is as fast as the network cards of its members in one node.
    """
    if members == 1:
        return 0.0
    within = max(1, gpu.per_node // stride)
    speed = gpu.link_gbps
    if members * stride > gpu.per_node:
        speed = min(speed, gpu.network_gbps * min(within, members))
    return moved * (members - 1) / members / (speed * 1e9 * rates.network)


def _all_to_all(sent: float, team: Team, gpu: Gpu, rates: Efficiencies) -> float:
    """Seconds in which each rank sends so many bytes to the ranks that have the experts."""
    members = team.expert_parallel
    if members == 1:
        return 0.0
    near = max(1, min(members, gpu.per_node // team.expert_tensor_parallel))
    link = sent * (near - 1) / members / (gpu.link_gbps * 1e9)
    network = sent * (members - near) / members / (gpu.network_gbps * 1e9)
    return max(link, network) / rates.network


def _end_of_update(model: Costs, team: Team, gpu: Gpu, rates: Efficiencies) -> tuple[float, float]:
    """Seconds in which gradients are summed over replicas, and in which the optimizer steps.

    Gradients are fp32. With the distributed optimizer they are reduce-scattered, each rank updates
    its part, and half-precision parameters are gathered; without, they are all-reduced. The step
    reads and writes 38 bytes for a parameter: gradient (thrice: unscaled, its norm, its use), main
    weight and two moments, in and out, and the weight. All wait for the stage that takes longest.
    """
    if not team.trains_all:
        return 0.0, 0.0
    replicas = team.data_parallel * team.context_parallel
    stride = team.expert_parallel * team.expert_tensor_parallel
    copies = max(1, team.ranks // (team.pipeline_parallel * stride))
    moved = 4 + 2 if team.distributed_optimizer else 4 + 4
    ends = []
    for dense, sparse in stage_weights(model, team):
        groups = (
            (dense / team.tensor_parallel, replicas, team.tensor_parallel),
            (sparse / stride, copies, stride),
        )
        reduce = sum(_exchange(n * moved, size, step, gpu, rates) for n, size, step in groups)
        updated = sum(n / (size if team.distributed_optimizer else 1) for n, size, _ in groups)
        ends.append((reduce, 38 * updated / (gpu.hbm_gbps * 1e9 * rates.memory)))
    return max(ends, key=sum)


def publish(model: Costs, team: Team, way: Way, width: int, gpu: Gpu, rates: Efficiencies) -> float:
    """Seconds from the learner's weights to the servers', one hop after the other.

    Tensors are gathered on rank 0. From there they are broadcast to the servers, or written to a disk
    from which the nodes of all servers read them at once (weights/transport.py). width: bytes of a weight.
    """
    size, tensors = model.parameters * width, model.layers * 9
    tensors += 3 * model.sparse_layers * model.experts
    seconds = _gather(model, team, width, gpu) / rates.network + tensors * _TENSOR_S
    if way == "disk":
        return seconds + 2 * size / (_DISK_GBPS * 1e9)
    speed = gpu.network_gbps if way == "network" else gpu.link_gbps
    return seconds + size / (speed * 1e9 * rates.network)


def _gather(model: Costs, team: Team, width: int, gpu: Gpu) -> float:
    """Seconds at full speed in which all weights come to rank 0, as Model._collect brings them.

    Shards come to the leader of their stage, each expert after the other, then whole tensors from
    there to rank 0. Ranks are Megatron's: stages are ranks/PP apart (World.leader_of); of a stage,
    tensor-parallel ranks are neighbours, and so are those of an expert.
    """

    def hop(source: int, target: int) -> float:
        """Seconds a byte."""
        if source == target:
            return 0.0
        near = source // gpu.per_node == target // gpu.per_node
        return 1 / (1e9 * (gpu.link_gbps if near else gpu.network_gbps))

    tensor, experts, slices = (
        team.tensor_parallel,
        team.expert_parallel,
        team.expert_tensor_parallel,
    )
    seconds = 0.0
    for stage, (dense, sparse) in enumerate(stage_weights(model, team)):
        leader = stage * (team.ranks // team.pipeline_parallel)
        each = dense * hop(leader, 0) + sum(
            dense / tensor * hop(leader + i, leader) for i in range(tensor)
        )
        each += sparse * hop(leader, 0) + sum(
            sparse / experts * hop(leader + i * slices, leader) for i in range(experts)
        )
        # slices of an expert are joined by all expert-parallel ranks at once
        each += sum(sparse / experts / slices * hop(leader + i, leader) for i in range(slices))
        seconds += each * width
    return seconds
