"""Time of a step: a roofline of rollout, scoring, update and weight sync. docs/planner.md has the formulas."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from megatron_fp16rl.models.costs import Costs, costs
from megatron_fp16rl.recipe import AdditionTask, Recipe
from megatron_fp16rl.tools.plan.ahead import Setup, simulate
from megatron_fp16rl.tools.plan.gpus import Gpu
from megatron_fp16rl.tools.plan.lengths import Packing, longest, packing
from megatron_fp16rl.tools.plan.servers import (
    BYTES,
    rank_weights,
    server_memory,
    state_bytes,
)
from megatron_fp16rl.tools.plan.sync import WeightSync, weight_sync

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
    """What one step works on, lengths in tokens; and the speeds that its GPU reaches."""

    recipe: Recipe
    model: Costs
    gpu: Gpu
    sequences: int
    prompt: float  # mean
    response: float  # mean
    most: int  # of a response
    room: int  # mean sequences that a server runs at once

    @property
    def tokens(self) -> float:
        return self.sequences * (self.prompt + self.response)

    @property
    def packing(self) -> Packing:
        return packing(self.recipe, self.prompt, self.response, self.most)

    @property
    def sync(self) -> WeightSync:
        return weight_sync(self.recipe, self.model, self.gpu)

    @property
    def prefill_token(self) -> float:
        """Of one token, on one server."""
        return self.model.layer_flops / (self.recipe.rollout.tensor_parallel * self.gpu.flops)

    def decode(self) -> float:
        """The decode steps of a server's even share of sequences, of which `room` run at once.

        Some response gets to the limit. Before that the batch shrinks, or waiting sequences fill it: a step's
        time is taken at the mean batch.
        """
        tokens = self.sequences / self.recipe.rollout.servers * self.response
        steps = max(self.most, tokens / self.room)
        running = tokens / steps
        cached = running * (self.prompt + CACHED_SHARE * self.response)
        return steps * self.decode_step(running, cached)

    def decode_step(self, running: float, cached: float) -> float:
        """Of a server's running sequences, with so many tokens in the cache.

        A GPU reads its weights and its cache, or its tensor cores are the bound.
        """
        model, gpu, parts = self.model, self.gpu, self.recipe.rollout.tensor_parallel
        width = BYTES[self.recipe.precision.served]
        heads = max(1, model.attention.kv_heads // parts)
        read = rank_weights(model, parts, model.distinct_experts(running))
        read += cached * model.attention_layers * heads * model.attention.cached
        read += 2 * running * state_bytes(model, parts, width) / width  # read and written
        flops = running * (model.layer_flops + model.output_flops)
        flops += model.attention_layers * model.attention.decode_pair_flops * cached
        bound = max(read * width / gpu.hbm, flops / (parts * gpu.flops))
        latency = ALL_REDUCE_S["network" if parts > gpu.per_node else "link"] if parts > 1 else 0.0
        return bound + 2 * model.layers * latency + DECODE_STEP_S

    def learn(self) -> tuple[float, float]:
        """Score and update."""
        forward, algorithm = self.forward(), self.recipe.algorithm
        # A KL penalty scores the reference policy, too. Passes for mismatch/* alone, every tenth step, are left out.
        score_s = forward * algorithm.needs_scores * (2 if algorithm.keeps_reference else 1)
        # Backward costs two forwards, gradients of activations and of weights, the latter not for LoRA. Full
        # recomputation is another forward.
        learner = self.recipe.learner
        again = learner.megatron.get("recompute_granularity") == "full"
        products = 2 if learner.lora is None else 1
        update_s = forward * (1 + products + again)
        if self.recipe.precision.head == "fp32":
            # A backward product runs in TF32, at half the 16-bit rate by the data sheets of all GPUS; the forward one
            # has 16-bit operands. On the last stage alone, for which the others wait.
            flops = self.sequences * self.response * self.model.output_flops
            ranks = learner.ranks // learner.pipeline_parallel
            update_s += products * flops / (ranks * self.gpu.flops)
        return score_s, update_s

    def forward(self) -> float:
        """One forward of all sequences of a step, split evenly over the learner's ranks."""
        settings, model = self.recipe.learner, self.model
        flops = self.tokens * (model.layer_flops + model.output_flops)
        flops += self.sequences * model.attention_flops((self.prompt + self.response) ** 2 / 2)
        if not settings.packing:  # the fitted runs were packed
            flops *= (1 - self.packing.packed.share) / (1 - self.packing.rows.share)
        # Layers with experts are many small kernels, and the host waits for counts of tokens.
        updates = self.sequences // settings.global_batch_size
        at_once = settings.data_parallel * settings.context_parallel * settings.micro_batch_tokens
        micro_batches = max(updates, self.tokens / at_once)
        sparse = model.sparse_layers / settings.pipeline_parallel
        seconds = max(flops / (settings.ranks * self.gpu.flops), micro_batches * sparse * EXPERTS_S)
        # In each update a stage idles until the first micro-batch arrives, or after the last has left.
        idle = (settings.pipeline_parallel - 1) / settings.model_chunks
        return seconds * (1 + idle * updates / micro_batches)


def estimate(
    recipe: Recipe, config: PretrainedConfig, gpu: Gpu, mean_tokens: float | None = None
) -> Times:
    """The times of a recipe's steps.

    config: the model's transformers configuration. mean_tokens: of responses; by default half of
    rollout.max_new_tokens.
    """
    rollout, step = recipe.rollout, _step(recipe, config, gpu, mean_tokens)
    # Every prompt once: SGLang's radix cache serves its other samples.
    prefill = rollout.prompts / rollout.servers * step.prompt * step.prefill_token
    decode, (score_s, update_s), sync = step.decode(), step.learn(), step.sync
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
        packing=step.packing,
        breakdown=breakdown,
    )


def setup(
    recipe: Recipe, config: PretrainedConfig, gpu: Gpu, mean_tokens: float | None = None
) -> Setup:
    """For `simulate`, whatever `rollout.ahead` is; arguments as of `estimate`."""
    rollout, step = recipe.rollout, _step(recipe, config, gpu, mean_tokens)
    return Setup(
        ahead=rollout.ahead,
        leaders=recipe.learner.data_parallel,
        prompts=rollout.prompts,
        samples=rollout.samples,
        prompt=step.prompt,
        response=step.response,
        most=step.most,
        servers=rollout.servers,
        room=step.room,
        decode_step=step.decode_step,
        prefill=step.prefill_token,
        learn=sum(step.learn()),
        sync=step.sync.seconds,
    )


def _step(recipe: Recipe, config: PretrainedConfig, gpu: Gpu, mean_tokens: float | None) -> _Step:
    rollout, lengths = recipe.rollout, longest(recipe)
    prompt = lengths.prompt * (1 if isinstance(recipe.task, AdditionTask) else PROMPT_SHARE)
    prompt = max(1.0, prompt)
    response = min(lengths.response, mean_tokens or MEAN_SHARE * lengths.response)
    # SGLang admits by what is in its cache, not by what may come.
    room = max(1, int(server_memory(recipe, config, gpu).kv_tokens / (prompt + response)))
    reached = replace(
        gpu,
        flops=gpu.flops * GEMM,
        hbm=gpu.hbm * MEMORY,
        link=gpu.link * NETWORK,
        network=gpu.network * NETWORK,
    )
    return _Step(
        recipe,
        costs(config),
        reached,
        sequences=rollout.prompts * rollout.samples,
        prompt=prompt,
        response=response,
        most=lengths.response,
        room=min(room, int(recipe.rollout.sglang.get("max_running_requests") or room)),
    )
