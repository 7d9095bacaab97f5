"""Memory of one rank of a learner that does not exist: Megatron's own model and optimizer on the meta device.

The learner's code builds the rank in a fake world of the recipe's true size (torch's fake process group), so
Megatron refuses here what it would refuse there, and bytes of weights, gradients and optimizer are those
that it would allocate. One micro-batch runs forward and backward while its tensors are counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import compact
from megatron_fp16rl.learner.logprobs import token_logprobs
from megatron_fp16rl.learner.model import HFTensors, Model
from megatron_fp16rl.learner.optimizer import Optimizer
from megatron_fp16rl.learner.output_rows import OutputRows
from megatron_fp16rl.learner.router_replay import RouterReplay
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.parallel import World, initialize, shutdown
from megatron_fp16rl.platform import meta
from megatron_fp16rl.recipe import Layout, Recipe
from megatron_fp16rl.tools.plan.lengths import (
    MicroBatch,
    largest_micro_batch,
    longest,
    micro_batches,
)
from megatron_fp16rl.tools.plan.live_bytes import LiveBytes


@dataclass(frozen=True)
class RankMemory:
    """Of each rank of a pipeline stage; sizes are in bytes."""

    stage: int
    ranks: tuple[int, int]  # first and last
    in_flight: int  # micro-batches (of one model chunk) whose activations are kept at once
    weights: int  # in the recipe's dtype, with buffers
    gradients: int  # fp32
    main_weights: int  # fp32, where the optimizer keeps its own
    adam: int  # two moments, fp32
    activations: int  # kept for the backward passes of the micro-batches in flight
    transient: int  # more at the peak of one micro-batch: logits, recomputation, gradients
    batch: int  # a rank's share of a step, but for records of experts, which are on the host
    sync: int  # while weights are sent; see sync_bytes

    @property
    def optimizer(self) -> int:
        return self.main_weights + self.adam

    @property
    def static(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def training(self) -> int:
        """At the peak of an update, beside what is always there."""
        return self.activations + self.transient

    @property
    def peak(self) -> int:
        return self.static + max(self.batch + self.training, self.sync)


@contextmanager
def rank_of(layout: Layout, rank: int) -> Iterator[World]:
    """One rank's view of a world in which it is the only process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    platform.plan_only()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
    try:
        yield initialize(layout, seed=0)
    finally:
        shutdown()


def rank_memory(
    recipe: Recipe, config: PretrainedConfig, stage: int
) -> tuple[RankMemory, list[HFTensors]]:
    """Memory of the ranks of a pipeline stage, and the tensors that they export together.

    Builds the stage's first rank. Raises RecipeError, and whatever Megatron refuses the recipe with.
    """
    layout, dtype = recipe.learner, recipe.precision.dtype
    per_stage = layout.ranks // layout.pipeline_parallel
    rank = stage * per_stage
    with rank_of(layout, rank) as world:
        model = Model(
            describe(config, layout),
            dtype,
            world,
            layout.distributed_optimizer,
            layout.megatron,
            layout.lora,
            layout.ddp,
            recipe.precision.head,
        )
        static = _static_bytes(recipe, model)
        # A tensor of all experts belongs to each of them: it counts once.
        firsts = [shard for shard in model.weights if not model.rule(shard.name).expert]
        exported = [model.hf_tensors(shard) for shard in firsts]
        largest = max(shape.numel() for tensors in exported for _, shape in tensors)
        exported += [model.hf_tensors(shard) for shard in model.buffers]
        # Activations: a micro-batch of the largest size through each model chunk.
        micro_batch = largest_micro_batch(recipe)
        runs = [_run(recipe, model, chunk, micro_batch) for chunk in range(layout.model_chunks)]
    chunks = in_flight(layout.pipeline_parallel, layout.model_chunks, stage, micro_batches(recipe))
    memory = RankMemory(
        stage=stage,
        ranks=(rank, rank + per_stage - 1),
        in_flight=len(chunks),
        **static,
        activations=sum(runs[chunk][0] for chunk in chunks),
        transient=max(max(0, peak - held) for held, peak in runs),
        batch=_batch_bytes(recipe),
        sync=sync_bytes(recipe, stage, largest * model.dtype.itemsize),
    )
    return memory, exported


def in_flight(stages: int, chunks: int, stage: int, micro_batches: int) -> list[int]:
    """The model chunks whose activations a rank keeps at its peak, in the order in which they run.

    Megatron-core 0.19.2, schedules.py: one forward, one backward (with one chunk), or interleaved, where
    chunks take turns every `stages` micro-batches.
    """
    if chunks == 1:
        return [0] * min(micro_batches, stages - stage)
    warmup = (stages - stage - 1) * 2 + (chunks - 1) * stages
    count = min(warmup + 1, micro_batches * chunks)
    return [i // stages % chunks for i in range(count)]


def sync_bytes(recipe: Recipe, stage: int, largest: int) -> int:
    """largest: bytes of the stage's largest tensor."""
    bucket = recipe.sync.bucket_mib << 20
    if recipe.sync.transport == "sliced":
        return 2 * recipe.sync.message_bytes  # every rank sends, from two flat buffers
    # Rank 0 sends a bucket of weights. Its largest tensor is there as shards, joined, and cast.
    return bucket + 3 * largest if stage == 0 else 0


def _batch_bytes(recipe: Recipe) -> int:
    """Of a rank's share of a step, all sequences as long as the longest; see Batch for a token's fields.

    It is there three times: as sampled, as redistributed over the ranks, and as one update has it.
    """
    rollout, floats = recipe.rollout, 4 if recipe.algorithm.keeps_reference else 3
    sequences = rollout.prompts * rollout.samples // recipe.learner.data_parallel
    return 3 * sequences * longest(recipe).sequence * (8 + 1 + 4 * floats)


def _static_bytes(recipe: Recipe, model: Model) -> dict[str, int]:
    """What the rank always holds, by RankMemory's names."""
    # Parameters may be views of one buffer, so storages are counted, each once.
    tensors = [t for gpt in model.gpt_models for t in (*gpt.parameters(), *gpt.buffers())]
    weights = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if t.is_meta}
    buffers = [b for chunk in model.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    optimizer = Optimizer(recipe.learner.optimizer, model, 1, None)
    main = [
        parameter
        for part in optimizer.parts
        if not part.is_stub_optimizer
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
    # In fp32 the main weights are the weights themselves.
    copies = [p for p in main if p.untyped_storage()._cdata not in weights]
    return {
        "weights": sum(storage.nbytes() for storage in weights.values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "main_weights": sum(p.nbytes for p in copies),
        "adam": sum(2 * 4 * p.numel() for p in main),
    }


# One micro-batch through one model chunk, in bytes: kept from the forward for the backward pass, log-probs included;
# and the peak of both passes together.
_Run = tuple[int, int]
_runs: dict[str, _Run] = {}


def _run(recipe: Recipe, model: Model, chunk: int, micro_batch: MicroBatch) -> _Run:
    """A micro-batch through one of the rank's model chunks; chunks that are alike are run once."""
    gpt, layout = model.gpt_models[chunk], recipe.learner
    # Only the last stage has an output layer and log-probs.
    output = (model.fp32_head, micro_batch.response) if gpt.post_process else None
    key = repr(
        (
            [type(layer.mlp).__name__ for layer in gpt.decoder.layers],
            (gpt.pre_process, output, model.dtype),
            (micro_batch.rows, micro_batch.seq, meta.assumptions()),
            (layout.tensor_parallel, layout.sequence_parallel, layout.expert_parallel),
            layout.context_parallel,
            (layout.expert_tensor_parallel, layout.megatron, layout.lora),
            (model.spec.shapes, model.spec.tied, model.spec.transformer),
            recipe.rollout.router_replay,
        )
    )
    if key not in _runs:
        _runs[key] = _measured_run(recipe, model, chunk, micro_batch)
    return _runs[key]


def _measured_run(recipe: Recipe, model: Model, chunk: int, micro_batch: MicroBatch) -> _Run:
    gpt, rows, seq = model.gpt_models[chunk], micro_batch.rows, micro_batch.seq
    model.chunks[chunk].train()
    replay = RouterReplay(model) if recipe.rollout.router_replay else None
    with LiveBytes() as live:
        # Packed sequences take what one as long as all does. No cut of it: `seq` is this rank's part already.
        tokens = torch.empty(rows, seq, dtype=torch.int64, device="meta")
        # No local name may hold a tensor below: it would count as live.
        if replay:  # records of experts are on the device from forward to backward
            replay.set(model.chunks[chunk], _records(model, replay, rows, seq))
        if not gpt.pre_process:
            gpt.set_input_tensor(_hidden(model, rows, seq).requires_grad_())
        options = {} if model.dtype is torch.float32 else {"fp32_output": False}
        if gpt.post_process:
            OutputRows(gpt).set(_places(micro_batch), seq)
        output = model.chunks[chunk](
            input_ids=tokens, position_ids=None, attention_mask=None, **options
        )
        if gpt.post_process:
            output = _logprobs(recipe, model, output.squeeze(0), micro_batch).sum()
        held = live.now
        torch.autograd.backward(output, torch.empty_like(output))
        return held, live.peak


def _records(model: Model, replay: RouterReplay, rows: int, seq: int) -> torch.Tensor:
    """[batch, seq, layers, top_k]: of the experts of this rank's layers; see Batch."""
    shape = (rows, seq, len(replay.layers), model.config.moe_router_topk)
    experts = torch.empty(shape, dtype=torch.int64, device="meta")
    return compact(experts, model.config.num_moe_experts)


def _hidden(model: Model, rows: int, seq: int) -> torch.Tensor:
    """[seq, batch, hidden]: what a stage receives from the one before."""
    layout = model.world.layout
    seq //= layout.tensor_parallel if layout.sequence_parallel else 1
    return torch.empty(seq, rows, model.config.hidden_size, dtype=model.dtype, device="meta")


def _places(micro_batch: MicroBatch) -> torch.Tensor:
    return torch.empty(micro_batch.response, dtype=torch.int64, device="meta")


def _logprobs(
    recipe: Recipe, model: Model, logits: torch.Tensor, micro_batch: MicroBatch
) -> torch.Tensor:
    """[response]: as Forward.logprobs computes them."""
    vocabulary, group = model.spec.shapes.vocabulary, model.world.tensor.group
    temperature = recipe.rollout.temperature
    return token_logprobs(logits, _places(micro_batch), vocabulary, group, temperature)
