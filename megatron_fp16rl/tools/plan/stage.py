"""One rank of a learner that is not there: Megatron's own model and optimizer, on the meta device.

The rank is built by the learner's code in a fake world of the recipe's true size (torch's fake process
group), so what Megatron refuses is refused here, and bytes of parameters, gradients and optimizer are
those that it would allocate. A micro-batch is run forward and backward, and the tensors are counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import compact
from megatron_fp16rl.learner.logprobs import token_logprobs
from megatron_fp16rl.learner.model import HFTensors, Model
from megatron_fp16rl.learner.optimizer import Optimizer
from megatron_fp16rl.learner.router_replay import RouterReplay
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.parallel import World, initialize, shutdown
from megatron_fp16rl.platform import meta
from megatron_fp16rl.recipe import Layout, Recipe
from megatron_fp16rl.tools.plan.live import LiveBytes


@dataclass(frozen=True)
class MicroBatch:
    """What a rank runs at once: `rows` sequences of `seq` tokens, `response` of all are learnt from."""

    rows: int
    seq: int
    response: int


@dataclass(frozen=True)
class Run:
    """One micro-batch through one model chunk, in bytes.

    held     kept from the forward pass for the backward pass, log-probs and all
    peak     at most at once, in both passes together, but for the making of log-probs
    logits   more than `held` while log-probs, and their gradient, are made of hidden states
    """

    held: int
    peak: int
    logits: int = 0


@dataclass(frozen=True)
class State:
    """What a rank always holds, in bytes.

    weights, gradients                   in the recipe's dtype, and fp32
    main_weights, adam                   what the optimizer updates, and its two moments, fp32
    optimizer_sharded, optimizer_whole   both of them with and without the distributed optimizer: one of
                                         the two is what there is
    """

    weights: int
    gradients: int
    main_weights: int
    adam: int
    optimizer_sharded: int
    optimizer_whole: int

    @property
    def optimizer(self) -> int:
        return self.main_weights + self.adam

    @property
    def static(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Stage:
    """A pipeline stage, as its first rank has it.

    largest    bytes of the largest whole tensor, which an export holds
    exported   names and shapes of what this stage's ranks export, experts of all ranks
    runs       of each model chunk
    """

    rank: int
    stage: int
    state: State
    largest: int
    exported: list[HFTensors]
    runs: tuple[Run, ...]


@contextmanager
def rank_of(layout: Layout, rank: int) -> Iterator[World]:
    """A rank's view of a world in which no other rank is."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    platform.plan_only()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
    try:
        yield initialize(layout, seed=0)
    finally:
        shutdown()


def build(recipe: Recipe, config: object, stage: int, micro_batch: MicroBatch | None) -> Stage:
    """The first rank of a pipeline stage. Raises RecipeError, and what Megatron refuses with.

    config: the model's transformers configuration. micro_batch: None to run none.
    """
    layout = recipe.learner
    rank = stage * (layout.ranks // layout.pipeline_parallel)
    with rank_of(layout, rank) as world:
        model = Model(
            describe(config, layout),
            recipe.precision.dtype,
            world,
            layout.distributed_optimizer,
            layout.megatron,
            layout.lora,
        )
        weights = _storages(tensor for gpt in model.gpt_models for tensor in _tensors(gpt))
        main, adam = _optimizer_bytes(recipe, model, weights)
        buffers = [
            buffer
            for chunk in model.chunks
            for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ]
        trained = sum(p.parameter.numel() for p in model.trained)
        each = 8 if recipe.precision.dtype == "fp32" else 12
        exported = [model.hf_tensors(shard) for shard in model.weights]
        runs = tuple(_run(recipe, model, i, micro_batch) for i in range(len(model.chunks)))
        state = State(
            weights=sum(weights.values()),
            gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
            main_weights=main,
            adam=adam,
            optimizer_sharded=sum(each * b.numel // b.data_parallel_world_size for b in buffers),
            optimizer_whole=each * trained,
        )
        return Stage(
            rank=rank,
            stage=stage,
            state=state,
            largest=max(shape.numel() for tensors in exported for _, shape in tensors)
            * model.dtype.itemsize,
            exported=exported + [model.hf_tensors(shard) for shard in model.buffers],
            runs=runs if micro_batch else (),
        )


def _tensors(gpt: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from gpt.parameters()
    yield from (b for b in gpt.buffers() if b is not None)


def _storages(tensors: Iterator[torch.Tensor]) -> dict[int, int]:
    """Bytes of the storages under tensors, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.is_meta]
    return {storage._cdata: storage.nbytes() for storage in storages}


def _optimizer_bytes(recipe: Recipe, model: Model, weights: dict[int, int]) -> tuple[int, int]:
    """Of main parameters that are not the weights themselves, and of Adam's two moments."""
    dtype = recipe.precision.dtype
    optimizer = Optimizer(
        recipe.learner.optimizer, model, dtype, recipe.learner.distributed_optimizer, 1, None
    )
    main = [
        parameter
        for part in optimizer.parts
        if not part.is_stub_optimizer
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
    extra = [p for p in main if p.untyped_storage()._cdata not in weights]
    return sum(p.nbytes for p in extra), sum(2 * 4 * p.numel() for p in main)


_known: dict[str, Run] = {}


def _run(recipe: Recipe, model: Model, chunk: int, micro_batch: MicroBatch | None) -> Run:
    """A micro-batch through one of the rank's model chunks; the like of it is run once."""
    if micro_batch is None:
        return Run(0, 0)
    gpt, layout = model.gpt_models[chunk], recipe.learner
    what = (
        [type(layer.mlp).__name__ for layer in gpt.decoder.layers],
        (gpt.pre_process, gpt.post_process, model.dtype, micro_batch, meta.assumed()),
        (layout.tensor_parallel, layout.sequence_parallel, layout.expert_parallel),
        (layout.expert_tensor_parallel, layout.megatron, layout.lora),
        (model.spec.shapes, model.spec.tied, model.spec.transformer, recipe.rollout.router_replay),
    )
    key = repr(what)
    if key not in _known:
        _known[key] = _run_anew(recipe, model, chunk, micro_batch)
    return _known[key]


def _run_anew(recipe: Recipe, model: Model, chunk: int, micro_batch: MicroBatch) -> Run:
    gpt = model.gpt_models[chunk]
    model.chunks[chunk].train()
    replay = RouterReplay(model) if recipe.rollout.router_replay else None
    with LiveBytes() as live:
        tokens = torch.empty(micro_batch.rows, micro_batch.seq, dtype=torch.int64, device="meta")
        if replay:
            replay.set(model.chunks[chunk], _records(model, replay, micro_batch))
        if not gpt.pre_process:
            gpt.set_input_tensor(_activations(model, micro_batch).requires_grad_())
        head = _Head(gpt, live) if gpt.post_process else None
        options = {} if model.dtype is torch.float32 else {"fp32_output": False}
        output = model.chunks[chunk](
            input_ids=tokens, position_ids=tokens, attention_mask=None, **options
        )
        if head:
            output = _logprobs(recipe, model, output, micro_batch).sum()
        held = live.now
        torch.autograd.backward(output, torch.empty_like(output))
        if head:
            return Run(held, max(head.peak, live.peak), max(0, head.logits - held))
        return Run(held, live.peak)


class _Head:
    """Tells what log-probs take, logits and gradient of these, from what the layers take.

    peak     at most before them; that after them is in `live`
    logits   at most between the layers' last forward and their first backward step
    """

    def __init__(self, gpt: torch.nn.Module, live: LiveBytes) -> None:
        self.live, self.peak, self.logits = live, 0, 0
        self._hook = gpt.output_layer.register_forward_pre_hook(self._begin)

    def _begin(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._hook.remove()
        self.peak, self.live.peak = self.live.peak, self.live.now
        inputs[0].register_hook(self._end)

    def _end(self, _: torch.Tensor) -> None:
        self.logits, self.live.peak = self.live.peak, self.live.now


def _activations(model: Model, micro_batch: MicroBatch) -> torch.Tensor:
    """[seq, batch, hidden]: what a stage gets from the one before."""
    layout = model.world.layout
    seq = micro_batch.seq // (layout.tensor_parallel if layout.sequence_parallel else 1)
    hidden = model.config.hidden_size
    return torch.empty(seq, micro_batch.rows, hidden, dtype=model.dtype, device="meta")


def _records(model: Model, replay: RouterReplay, micro_batch: MicroBatch) -> torch.Tensor:
    """[batch, seq, layers, top_k]: of the experts of this rank's layers; see Batch."""
    none = torch.empty(
        *(micro_batch.rows, micro_batch.seq, len(replay.layers), model.config.moe_router_topk),
        dtype=torch.int64,
        device="meta",
    )
    return compact(none, model.config.num_moe_experts)


def _logprobs(
    recipe: Recipe, model: Model, logits: torch.Tensor, micro_batch: MicroBatch
) -> torch.Tensor:
    """[response]: as Learner._logprobs, of as many tokens as the micro-batch says."""
    at = torch.empty(micro_batch.response, dtype=torch.int64, device="meta")
    return token_logprobs(
        logits[at, at],
        at,
        model.spec.shapes.vocabulary,
        model.world.tensor.group,
        recipe.rollout.temperature,
    )
