"""Time of a step: a roofline of rollout, scoring, update and weight sync. docs/planner.md has the formulas."""

import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_fp16rl.recipe import AdditionTask, Recipe
from megatron_fp16rl.recipe.learner import Learner
from megatron_fp16rl.tools.plan.costs import Costs, costs
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.lengths import longest
from megatron_fp16rl.tools.plan.servers import BYTES, layer_weights, output_weights, server_memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Shares of peak FLOP/s, memory bandwidth and link or network bandwidth that are reached, and the least time
# of one layer with experts, forward (many small kernels, and the host waits for counts of tokens). Fitted
# with this model to three step times of NeMo-RL 0.6 on H100 (docs.nvidia.com/nemo/rl/0.6.0/about/
# performance-summary.html); docs/planner.md has the rows, the prior and the errors.
GEMM, MEMORY, NETWORK, EXPERTS_S = 0.388, 0.480, 0.453, 3.36e-3

# Assumed, not fitted.
MEAN_SHARE = 0.5  # the mean response, as a share of max_new_tokens
PROMPT_SHARE = 0.25  # the mean prompt, as a share of the longest
DECODE_STEP_S = 1.5e-3  # of a decode step: scheduler, sampling, launch of the CUDA graph
ALL_REDUCE_S = {"link": 10e-6, "network": 75e-6}  # latency of a small one, within a node and across
TENSOR_S = 100e-6  # rank 0's work on one tensor of an export: gather, send, Python
DISK = 2e9  # bytes a second that one node writes to, or reads from, a shared file system

_QUANTILES = 64


@dataclass(frozen=True)
class Times:
    """Seconds of a step on policy, whose parts follow one another."""

    step_s: float
    rollout_s: float
    score_s: float
    update_s: float
    sync_s: float
    one_step_off_s: float  # of a step whose rollouts go on while the learner learns
    tokens_per_s_per_gpu: float  # prompts and responses, over the learner's and the servers' GPUs
    breakdown: dict[str, float]  # of rollout and update, in seconds; and the means they rest on


@dataclass(frozen=True)
class _Step:
    """What one step works on; lengths in tokens."""

    sequences: int
    prompts: int
    prompt: int
    responses: list[int]  # quantiles of their lengths, in order
    longest: int  # prompt and response
    updates: int
    scorings: int


def estimate(
    recipe: Recipe, config: "PretrainedConfig", gpu: Gpu, mean_tokens: float | None = None
) -> Times:
    """The times of a recipe's steps.

    config: the model's transformers configuration. mean_tokens: of responses; by default half of
    rollout.max_new_tokens.
    """
    model, step = costs(config), _step(recipe, mean_tokens)
    rollout = _rollout(model, recipe, config, step, gpu)
    score_s, update = _learner(model, recipe, step, gpu)
    rollout_s, update_s = sum(rollout.values()), sum(update.values())
    sync_s = _sync(model, recipe, gpu)
    step_s = rollout_s + score_s + update_s + sync_s
    gpus = recipe.learner.ranks + recipe.rollout.servers * recipe.rollout.tensor_parallel
    response = fmean(step.responses)
    return Times(
        step_s=step_s,
        rollout_s=rollout_s,
        score_s=score_s,
        update_s=update_s,
        sync_s=sync_s,
        one_step_off_s=max(rollout_s, score_s + update_s) + sync_s,
        tokens_per_s_per_gpu=step.sequences * (step.prompt + response) / step_s / gpus,
        breakdown={
            "mean_prompt_tokens": step.prompt,
            "mean_response_tokens": response,
            **rollout,
            **{f"update_{name}": seconds for name, seconds in update.items()},
        },
    )


def _step(recipe: Recipe, mean_tokens: float | None) -> _Step:
    settings, most = recipe.rollout, longest(recipe)
    sequences = settings.prompts * settings.samples
    mean = min(most.response, mean_tokens or MEAN_SHARE * most.response)
    is_exact = isinstance(recipe.task, AdditionTask)
    share = -(-sequences // settings.servers)
    return _Step(
        sequences=sequences,
        prompts=settings.prompts,
        prompt=most.prompt if is_exact else max(1, round(most.prompt * PROMPT_SHARE)),
        responses=response_lengths(mean, most.response, min(_QUANTILES, share)),
        longest=most.sequence,
        updates=sequences // recipe.learner.global_batch_size,
        scorings=1 if recipe.algorithm.kl is None else 2,  # a KL penalty scores the reference, too
    )


def response_lengths(mean: float, most: int, count: int) -> list[int]:
    """`count` quantiles of an exponential distribution of that mean, cut off at `most`, in order.

    What is beyond the limit is cut to it, as responses are: a fifth of all if the mean is half of it.
    The last quantile is the limit: among many responses some go round in circles.
    """
    if mean >= 0.98 * most:
        return [most] * count
    low, high = mean / 10, 1000.0 * most
    for _ in range(80):  # bisection: the mean of the cut distribution grows with the scale
        scale = math.sqrt(low * high)
        if scale * -math.expm1(-most / scale) < mean:
            low = scale
        else:
            high = scale
    quantiles = [(i + 0.5) / count for i in range(count)]
    lengths = [max(1, min(most, round(-scale * math.log1p(-q)))) for q in quantiles]
    return [*lengths[:-1], most]


def _rollout(
    model: Costs, recipe: Recipe, config: "PretrainedConfig", step: _Step, gpu: Gpu
) -> dict[str, float]:
    """Seconds of prefill and decoding of one server, whose share is an even one."""
    settings, memory = recipe.rollout, server_memory(recipe, config, gpu)
    parts, width = settings.tensor_parallel, BYTES[recipe.precision.served]
    # Prefill: every prompt once (SGLang's radix cache); its last token alone has logits.
    prompts = -(-step.prompts // settings.servers)
    weights = step.prompt * layer_weights(model, parts, model.top_k) + output_weights(model, parts)
    flops = 2 * weights + model.attention_flops(_causal_pairs(step.prompt)) / parts
    prefill = prompts * flops / (gpu.flops * GEMM)
    prefill += _all_reduces(model, parts, prompts * step.prompt, width, gpu)
    # Decoding: between one quantile of lengths and the next the batch is constant. Sequences that
    # the cache has no room for make the same steps later.
    room = int(memory.kv_tokens / (step.prompt + fmean(step.responses)))
    room = max(1, min(room, memory.max_running))
    share = -(-step.sequences // settings.servers)
    decode, begin, count = 0.0, 0, len(step.responses)
    for i, end in enumerate(step.responses):
        unfinished = share * (count - i) / count
        running = min(unfinished, room)
        steps = (end - begin) * unfinished / running
        cached = running * (step.prompt + (begin + end) / 2)
        decode += steps * _decode_step(model, parts, running, cached, width, gpu)
        begin = end
    return {"prefill": prefill, "decode": decode}


def _decode_step(
    model: Costs, parts: int, running: float, cached: float, width: int, gpu: Gpu
) -> float:
    """Seconds in which `running` sequences, with `cached` tokens in all, get one token each.

    A GPU reads its weights and its cache, or its tensor cores are the bound; then come the all-reduces.
    """
    kv_width = model.layers * max(1, model.attention.kv_heads // parts) * model.attention.cached
    weights = layer_weights(model, parts, model.distinct_experts(running))
    read = (weights + output_weights(model, parts) + cached * kv_width) * width
    active = layer_weights(model, parts, model.top_k) + output_weights(model, parts)
    attention = model.layers * model.attention.decode_pair_flops * cached / parts
    bound = max(
        read / (gpu.hbm * MEMORY),
        (2 * running * active + attention) / (gpu.flops * GEMM),
    )
    return bound + _all_reduces(model, parts, running, width, gpu) + DECODE_STEP_S


def _all_reduces(model: Costs, parts: int, tokens: float, width: int, gpu: Gpu) -> float:
    """Seconds of a forward pass's all-reduces of hidden states: two in every layer."""
    if parts == 1:
        return 0.0
    latency = ALL_REDUCE_S["network" if parts > gpu.per_node else "link"]
    moved = 2 * tokens * model.hidden * width  # a reduce-scatter and an all-gather
    return 2 * model.layers * (latency + _ring(moved, parts, 1, gpu))


def _learner(model: Costs, recipe: Recipe, step: _Step, gpu: Gpu) -> tuple[float, dict[str, float]]:
    """Seconds of scoring, and of the parts of all updates of a step."""
    settings = recipe.learner
    if recipe.slurm is not None:  # Slurm spreads the learner's ranks evenly over its nodes
        gpu = replace(gpu, per_node=-(-settings.ranks // recipe.slurm.learner_nodes))
    score_s = step.scorings * sum(_forward(model, settings, step, 1, gpu).values())
    forward = _forward(model, settings, step, step.updates, gpu)
    # Backward costs two forwards: gradients of activations, and of weights but for LoRA. Full
    # recomputation is another forward. Of exchanges backward has as many as forward.
    again = 1 if settings.megatron.get("recompute_granularity") == "full" else 0
    computed = (3 if settings.lora is None else 2) + again
    update = {
        name: (computed if name in ("compute", "bubble") else 2 + again) * seconds
        for name, seconds in forward.items()
    }
    if settings.lora is None:
        update["data_parallel"], update["optimizer"] = (
            step.updates * seconds for seconds in _end_of_update(model, settings, gpu)
        )
    return score_s, update


def _forward(
    model: Costs, settings: Learner, step: _Step, batches: int, gpu: Gpu
) -> dict[str, float]:
    """Seconds of one forward of a rank's share of a step, in so many batches, on the slowest stage."""
    tensor, stages, experts = (
        settings.tensor_parallel,
        settings.pipeline_parallel,
        settings.expert_parallel,
    )
    lengths = [step.prompt + response for response in step.responses]
    if settings.model_chunks > 1:  # the interleaved schedule pads all to the longest
        lengths = [step.longest]
    share = max(1, step.sequences // settings.data_parallel)
    tokens, pairs = share * fmean(lengths), share * fmean(map(_causal_pairs, lengths))
    micro_batches = math.ceil(tokens / batches / settings.micro_batch_tokens)
    if settings.model_chunks > 1:  # and needs a multiple of the stages
        micro_batches = -(-micro_batches // stages) * stages

    # The stage with most layers sets the pace. The output layer counts as if all stages shared it.
    layers = _most_layers(model, settings)
    flops = (tokens * model.layer_flops + model.attention_flops(pairs)) * layers / model.layers
    flops += tokens * model.output_flops / stages
    sparse = layers * model.sparse_layers / model.layers
    compute = max(flops / (tensor * gpu.flops * GEMM), batches * micro_batches * sparse * EXPERTS_S)
    hidden = tokens * model.hidden * 2  # bytes of hidden states, in half precision
    # Each attention and each dense MLP gathers the hidden states and scatters them again.
    gathers = 2 * layers * (1 if model.experts else 2)
    # Each layer with experts sends every token to top_k of them, and back.
    sent = 2 * sparse * hidden * model.top_k / tensor
    far = 1 - min(1.0, gpu.per_node / (experts * settings.expert_tensor_parallel))
    parts = {
        "compute": compute,
        "tensor_parallel": gathers * _ring(hidden, tensor, 1, gpu),
        "expert_parallel": 0.0
        if experts == 1
        else max(sent * far / gpu.network, sent * (1 - far) / gpu.link) / NETWORK,
    }
    # A stage idles until the first micro-batch arrives, or after the last has left.
    idle = (stages - 1) / settings.model_chunks / micro_batches
    return {**parts, "bubble": idle * sum(parts.values())}


def _most_layers(model: Costs, settings: Learner) -> float:
    """Layers of the pipeline stage that has most: what the recipe sets, or an even share of the rest."""
    given = settings.uneven_stages.values()
    between = settings.pipeline_parallel - len(given)
    return max(*given, 0, (model.layers - sum(given)) / between if between else 0)


def _end_of_update(model: Costs, settings: Learner, gpu: Gpu) -> tuple[float, float]:
    """Seconds in which gradients are summed over replicas, and in which the optimizer steps.

    Gradients are fp32: with the distributed optimizer they are reduce-scattered and half-precision
    weights gathered, else they are all-reduced. The optimizer reads and writes 38 bytes a parameter:
    gradient (three times: unscaled, its norm, its use), main weight and two moments, in and out, weight.
    """
    share = _most_layers(model, settings) / model.layers
    split = settings.expert_parallel * settings.expert_tensor_parallel
    dense = (model.parameters - model.expert_parameters) * share / settings.tensor_parallel
    experts = model.expert_parameters * share / split
    copies = settings.ranks // (settings.pipeline_parallel * split)
    sharded = settings.distributed_optimizer
    moved = 4 + 2 if sharded else 4 + 4
    reduce = _ring(dense * moved, settings.data_parallel, settings.tensor_parallel, gpu)
    reduce += _ring(experts * moved, copies, split, gpu)
    updated = dense / (settings.data_parallel if sharded else 1)
    updated += experts / (copies if sharded else 1)
    return reduce, 38 * updated / (gpu.hbm * MEMORY)


def _sync(model: Costs, recipe: Recipe, gpu: Gpu) -> float:
    """Seconds of the way of all weights, first to the learner's rank 0, from there to the servers."""
    ranks, slurm = recipe.learner.ranks, recipe.slurm
    gpus = ranks + recipe.rollout.servers * recipe.rollout.tensor_parallel
    learner_nodes = slurm.learner_nodes if slurm else -(-ranks // gpu.per_node)
    far_servers = gpus > gpu.per_node or (slurm is not None and slurm.rollout_nodes > 0)
    size = model.parameters * BYTES[recipe.precision.served]
    seconds = TENSOR_S * (9 * model.layers + 3 * model.sparse_layers * model.experts)
    if ranks > 1:
        seconds += size / ((gpu.network if learner_nodes > 1 else gpu.link) * NETWORK)
    if recipe.sync.transport == "disk":  # rank 0 writes, then all nodes of servers read at once
        return seconds + 2 * size / DISK
    return seconds + size / ((gpu.network if far_servers else gpu.link) * NETWORK)


def _ring(moved: float, members: int, stride: int, gpu: Gpu) -> float:
    """Seconds of an all-gather or a reduce-scatter of so many bytes in a ring of ranks.

    stride: distance of neighbours in ranks. A ring over several nodes is as fast as the network cards
    of its members in one node.
    """
    speed = gpu.link
    if members * stride > gpu.per_node:
        speed = min(speed, gpu.network * min(members, max(1, gpu.per_node // stride)))
    return moved * (members - 1) / members / (speed * NETWORK)


def _causal_pairs(seq: float) -> float:
    """Pairs of a query and a key that is not after it."""
    return seq * (seq + 1) / 2
