"""Time of a step: a roofline of rollout, scoring, update and weight sync. docs/planner.md has the formulas."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from megatron_fp16rl.models.costs import Costs, costs
from megatron_fp16rl.recipe import AdditionTask, Recipe
from megatron_fp16rl.tools.plan.ahead import Setup, simulate
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.lengths import longest
from megatron_fp16rl.tools.plan.packing import Packing, packing
from megatron_fp16rl.tools.plan.servers import (
    BYTES,
    option,
    rank_weights,
    server_memory,
    state_bytes,
)
from megatron_fp16rl.tools.plan.sync import Speeds, WeightSync, weight_sync

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Shares of peak FLOP/s, memory bandwidth and network bandwidth that are reached, and the least time of one
# layer with experts of one micro-batch, forward. Fitted to published step times of NeMo-RL 0.6 on H100:
# docs/planner.md has the rows and the errors.
GEMM, MEMORY, NETWORK, EXPERTS_S = 0.389, 0.411, 0.447, 3.93e-3

# Assumed, not fitted.
MEAN_SHARE = 0.5  # the mean response, as a share of max_new_tokens
PROMPT_SHARE = 0.25  # the mean prompt, as a share of the longest
CACHED_SHARE = 0.75  # tokens in the cache of a running response, as a share of the mean response
DECODE_STEP_S = 1.5e-3  # of a decode step: scheduler, sampling, launch of the CUDA graph
ALL_REDUCE_S = {"link": 10e-6, "network": 75e-6}  # of a small one, within a node and across


@dataclass(frozen=True)
class Times:
    """Seconds of a step: its parts follow one another, or rollouts go on while the learner learns."""

    step_s: float
    rollout_s: float
    score_s: float
    update_s: float
    sync_s: float
    sync: WeightSync
    one_step_off_s: float  # of a step with rollout.ahead: 1, whatever the recipe says
    learner_waits_s: float  # for rollouts; a sync keeps both from work
    servers_wait_s: float  # for the learner
    tokens_per_s_per_gpu: float  # prompts and responses, over the learner's and the servers' GPUs
    packing: Packing  # what it is worth, whatever the recipe says
    breakdown: dict[str, float]  # the lengths that all rest on, and the rollout's parts in seconds


@dataclass(frozen=True)
class _Step:
    """What one step works on; lengths in tokens."""

    sequences: int
    prompt: float  # mean
    response: float  # mean
    most: int  # of a response

    @property
    def tokens(self) -> float:
        return self.sequences * (self.prompt + self.response)


def estimate(
    recipe: Recipe, config: "PretrainedConfig", gpu: Gpu, mean_tokens: float | None = None
) -> Times:
    """The times of a recipe's steps.

    config: the model's transformers configuration. mean_tokens: of responses; by default half of
    rollout.max_new_tokens.
    """
    rollout, step, model = recipe.rollout, _step(recipe, mean_tokens), costs(config)
    # Every prompt once: SGLang's radix cache serves its other samples.
    prefill = rollout.prompts / rollout.servers * step.prompt * _prefill_token(model, recipe, gpu)
    decode = _decode(model, recipe, step, _room(recipe, config, step, gpu), gpu)
    score_s, update_s = _learn(model, recipe, step, gpu)
    sync = _sync(model, recipe, gpu)
    rollout_s, sync_s, learn_s = prefill + decode, sync.seconds, score_s + update_s
    one_step_off_s = max(rollout_s, learn_s) + sync_s
    breakdown = {
        "mean_prompt_tokens": step.prompt,
        "mean_response_tokens": step.response,
        "prefill": prefill,
        "decode": decode,
    }
    tokens = step.tokens
    if rollout.ahead == 0:
        step_s, waits = rollout_s + learn_s + sync_s, (rollout_s, learn_s)
    elif rollout.ahead == 1:
        step_s = one_step_off_s
        waits = max(0.0, rollout_s - learn_s), max(0.0, learn_s - rollout_s)
    else:
        steps = simulate(setup(recipe, config, gpu, mean_tokens))
        step_s, waits = steps.step_s, (steps.learner_waits_s, steps.servers_wait_s)
        tokens = step.sequences * step.prompt + steps.learnt
        breakdown |= {"dropped_tokens": steps.dropped, "token_age": steps.age}
    gpus = recipe.learner.ranks + rollout.servers * rollout.tensor_parallel
    return Times(
        step_s=step_s,
        rollout_s=rollout_s,
        score_s=score_s,
        update_s=update_s,
        sync_s=sync_s,
        sync=sync,
        one_step_off_s=one_step_off_s,
        learner_waits_s=waits[0],
        servers_wait_s=waits[1],
        tokens_per_s_per_gpu=tokens / step_s / gpus,
        packing=_packing(recipe, step),
        breakdown=breakdown,
    )


def setup(
    recipe: Recipe, config: "PretrainedConfig", gpu: Gpu, mean_tokens: float | None = None
) -> Setup:
    """For `simulate`, whatever `rollout.ahead` is; arguments as of `estimate`."""
    rollout, step, model = recipe.rollout, _step(recipe, mean_tokens), costs(config)
    return Setup(
        ahead=rollout.ahead,
        leaders=recipe.learner.data_parallel,
        prompts=rollout.prompts,
        samples=rollout.samples,
        prompt=step.prompt,
        response=step.response,
        most=step.most,
        servers=rollout.servers,
        room=_room(recipe, config, step, gpu),
        decode_step=partial(_decode_step, model, recipe, gpu),
        prefill=_prefill_token(model, recipe, gpu),
        learn=sum(_learn(model, recipe, step, gpu)),
        sync=_sync(model, recipe, gpu).seconds,
    )


def _step(recipe: Recipe, mean_tokens: float | None) -> _Step:
    rollout, lengths = recipe.rollout, longest(recipe)
    share = 1 if isinstance(recipe.task, AdditionTask) else PROMPT_SHARE
    return _Step(
        sequences=rollout.prompts * rollout.samples,
        prompt=max(1.0, lengths.prompt * share),
        response=min(lengths.response, mean_tokens or MEAN_SHARE * lengths.response),
        most=lengths.response,
    )


def _room(recipe: Recipe, config: "PretrainedConfig", step: _Step, gpu: Gpu) -> int:
    """Mean sequences that a server's cache holds: SGLang admits by what is in it, not by what may come."""
    tokens = server_memory(recipe, config, gpu).kv_tokens
    room = max(1, int(tokens / (step.prompt + step.response)))
    return min(room, int(option(recipe, "max_running_requests") or room))


def _learn(model: Costs, recipe: Recipe, step: _Step, gpu: Gpu) -> tuple[float, float]:
    """Score and update."""
    forward, algorithm = _forward(model, recipe, step, gpu), recipe.algorithm
    # A KL penalty scores the reference policy, too. Passes for mismatch/* alone, every tenth step, are left out.
    score_s = forward * algorithm.needs_scores * (2 if algorithm.keeps_reference else 1)
    # Backward costs two forwards, gradients of activations and of weights, the latter not for LoRA. Full
    # recomputation is another forward.
    again = recipe.learner.megatron.get("recompute_granularity") == "full"
    products = 2 if recipe.learner.lora is None else 1
    update_s = forward * (1 + products + again)
    if recipe.precision.head == "fp32":
        update_s += products * _tf32(model, recipe, step, gpu)
    return score_s, update_s


def _tf32(model: Costs, recipe: Recipe, step: _Step, gpu: Gpu) -> float:
    """What one backward product of an fp32 head takes more than one of 16 bits, over all responses.

    It runs in TF32, at half the 16-bit rate by the data sheets of all GPUS; the forward one has 16-bit operands.
    On the last stage alone, for which the others wait. That it reaches the same share of its peak is assumed.
    """
    ranks = recipe.learner.ranks // recipe.learner.pipeline_parallel
    return step.sequences * step.response * model.output_flops / (ranks * gpu.flops * GEMM)


def _prefill_token(model: Costs, recipe: Recipe, gpu: Gpu) -> float:
    """Of one token, on one server."""
    return model.layer_flops / (recipe.rollout.tensor_parallel * gpu.flops * GEMM)


def _decode(model: Costs, recipe: Recipe, step: _Step, room: int, gpu: Gpu) -> float:
    """The decode steps of a server's even share of sequences, of which `room` run at once.

    Some response gets to the limit. Before that the batch shrinks, or waiting sequences fill it: a step's
    time is taken at the mean batch.
    """
    tokens = step.sequences / recipe.rollout.servers * step.response
    steps = max(step.most, tokens / room)
    running = tokens / steps
    cached = running * (step.prompt + CACHED_SHARE * step.response)
    return steps * _decode_step(model, recipe, gpu, running, cached)


def _decode_step(model: Costs, recipe: Recipe, gpu: Gpu, running: float, cached: float) -> float:
    """Of a server's running sequences, with so many tokens in the cache.

    A GPU reads its weights and its cache, or its tensor cores are the bound.
    """
    parts, width = recipe.rollout.tensor_parallel, BYTES[recipe.precision.served]
    heads = max(1, model.attention.kv_heads // parts)
    read = rank_weights(model, parts, model.distinct_experts(running))
    read += cached * model.attention_layers * heads * model.attention.cached
    read += 2 * running * state_bytes(model, parts, width) / width  # read and written
    flops = running * (model.layer_flops + model.output_flops)
    flops += model.attention_layers * model.attention.decode_pair_flops * cached
    bound = max(read * width / (gpu.hbm * MEMORY), flops / (parts * gpu.flops * GEMM))
    latency = ALL_REDUCE_S["network" if parts > gpu.per_node else "link"] if parts > 1 else 0.0
    return bound + 2 * model.layers * latency + DECODE_STEP_S


def _forward(model: Costs, recipe: Recipe, step: _Step, gpu: Gpu) -> float:
    """One forward of all sequences of a step, split evenly over the learner's ranks."""
    settings, sequence = recipe.learner, step.prompt + step.response
    flops = step.tokens * (model.layer_flops + model.output_flops)
    flops += step.sequences * model.attention_flops(sequence**2 / 2)
    if not settings.packing:  # the fitted runs were packed
        made = _packing(recipe, step)
        flops *= (1 - made.packed.share) / (1 - made.rows.share)
    # Layers with experts are many small kernels, and the host waits for counts of tokens.
    updates = step.sequences // settings.global_batch_size
    at_once = settings.data_parallel * settings.context_parallel * settings.micro_batch_tokens
    micro_batches = step.tokens / at_once
    micro_batches = max(updates, micro_batches)
    sparse = model.sparse_layers / settings.pipeline_parallel
    seconds = max(flops / (settings.ranks * gpu.flops * GEMM), micro_batches * sparse * EXPERTS_S)
    # In each update a stage idles until the first micro-batch arrives, or after the last has left.
    idle = (settings.pipeline_parallel - 1) / settings.model_chunks
    return seconds * (1 + idle * updates / micro_batches)


def _packing(recipe: Recipe, step: _Step) -> Packing:
    return packing(recipe, step.prompt, step.response, step.most)


def _sync(model: Costs, recipe: Recipe, gpu: Gpu) -> WeightSync:
    shares = gpu.link * NETWORK, gpu.network * NETWORK, gpu.hbm * MEMORY
    return weight_sync(recipe, model, Speeds(*shares, gpu.per_node))
