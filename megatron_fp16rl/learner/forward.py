"""Forward and backward passes: micro-batches through Megatron's pipeline schedule, log-probs out."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch, no_expert
from megatron_fp16rl.data.micro_batches import (
    MicroBatch,
    group_by_length,
    group_to_fill,
    in_packs,
    in_rows,
    padded_length,
    split_until,
)
from megatron_fp16rl.learner.arrangement import Arrangement, Predictors, arrange
from megatron_fp16rl.learner.attention import Attention
from megatron_fp16rl.learner.logprobs import token_logprobs
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.learner.nonfinite import NonFiniteGuard
from megatron_fp16rl.learner.output_rows import OutputRows
from megatron_fp16rl.learner.router_replay import RouterReplay
from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.recipe.learner import Learner as LearnerSettings

B = TypeVar("B", bound=Batch)
R = TypeVar("R")


class Forward:
    """Runs batches of one data-parallel rank through the model."""

    def __init__(
        self,
        model: Model,
        settings: LearnerSettings,
        guard: NonFiniteGuard,
        router_replay: RouterReplay | None,
    ) -> None:
        self.model, self.settings, self.guard = model, settings, guard
        self.router_replay = router_replay
        self.attention = Attention(model.config, model.dtype, settings.packing)
        self.outputs = {
            chunk: OutputRows(gpt)
            for chunk, gpt in zip(model.chunks, model.gpt_models, strict=True)
            if gpt.post_process
        }
        self.multiple = platform.current().PAD_TO_MULTIPLE_OF
        self.schedule = get_forward_backward_func()

    def micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """Sequences packed, or of similar length and padded, within the recipe's token budget.

        Collective over the data-parallel ranks.
        """
        world, settings = self.model.world, self.settings
        lengths, interleaved = batch.lengths.tolist(), len(self.model.chunks) > 1
        padding = settings.padding(self.multiple)
        budget = settings.micro_batch_tokens * settings.context_parallel
        if settings.packing:
            groups = group_to_fill(lengths, budget, padding.sequence)
        else:
            groups = group_by_length(lengths, budget, padding.row, interleaved)
        # As many on every data-parallel rank: experts are shared among them, pass by pass.
        count_on_device = torch.tensor(len(groups), device=world.device)
        dist.all_reduce(count_on_device, dist.ReduceOp.MAX, group=world.data.group)
        count = int(count_on_device)
        if interleaved:  # Megatron requires a multiple of the stages
            count = -(-count // world.pipeline.size) * world.pipeline.size
        groups = split_until(groups, lengths, count, settings.packing)
        if len(groups) < count:
            raise RecipeError(
                f"a data-parallel rank has {len(lengths)} sequences an update, but the pipeline "
                f"needs {count} micro-batches; raise learner.global_batch_size"
            )
        # The interleaved schedule mixes up varying shapes between two ranks: there all have one shape.
        return (in_packs if settings.packing else in_rows)(groups, lengths, padding, interleaved)

    def run(
        self,
        batch: B,
        micro_batches: list[MicroBatch],
        finish: Callable[[torch.Tensor, B], tuple[torch.Tensor, R]],
        temperature: float,
        backward: bool,
    ) -> list[R]:
        """Runs Megatron's schedule over micro-batches.

        finish: takes the log-probs [rows, seq] of a micro-batch, and the micro-batch; returns a loss, and
        what `run` is to return for it, on the last pipeline stage. temperature: divides the logits, as
        in sampling.
        """
        model = self.model

        def step(
            data: Iterator[tuple[B, Arrangement]], chunk: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, R]]]:
            rows, arrangement = next(data)
            at = arrangement.predictors(rows.mask) if chunk in self.outputs else None

            def finish_rows(logits: torch.Tensor) -> tuple[torch.Tensor, R]:
                assert at is not None
                return finish(self.logprobs(logits.squeeze(0), rows, at, temperature), rows)

            return self.logits(rows, arrangement, at.place if at else None, chunk), finish_rows

        for chunk in model.chunks:
            chunk.train(backward)
        # Generators: a micro-batch is sliced out of the batch when its turn comes.
        data = [
            (
                (batch.rows(m.sequences, max(m.lengths)), arrange(m, model.world.context))
                for m in micro_batches
            )
            for _ in model.chunks
        ]
        shapes = [m.shape for m in micro_batches]
        return self.schedule(
            forward_step_func=step,
            data_iterator=data if len(model.chunks) > 1 else data[0],
            model=model.chunks,
            num_microbatches=len(micro_batches),
            seq_length=max(seq for _, seq in shapes),
            micro_batch_size=max(rows for rows, _ in shapes),
            forward_only=not backward,
        )

    def logits(
        self,
        rows: Batch,
        arrangement: Arrangement,
        place: torch.Tensor | None,
        chunk: torch.nn.Module,
    ) -> torch.Tensor:
        """[1, n, vocab / ranks] on the last stage, hidden states on the others.

        place: [n], the tokens whose logits are wanted, on the last stage; see Predictors. Padding is on the right, so a causal
        mask hides it.
        """
        # Refuses sequences that are too long for it; rounded up as for the layers, or each length is asked about.
        self.attention.kernel(padded_length(rows.tokens.shape[1], self.multiple))
        if self.router_replay:
            self.router_replay.set(chunk, _arranged_experts(rows, arrangement))
        if place is not None:
            self.outputs[chunk].set(place, arrangement.source.shape[1])
        # Megatron would copy all logits to fp32; log-probs upcast them chunk by chunk.
        options = {} if self.model.dtype is torch.float32 else {"fp32_output": False}
        return chunk(
            input_ids=arrangement.take(rows.tokens, 0),
            position_ids=None,  # for learnt positions only
            attention_mask=None,
            packed_seq_params=arrangement.packed(self.multiple, rows.tokens.device),
            **options,
        )

    def logprobs(
        self,
        logits: torch.Tensor,
        rows: Batch,
        at: Predictors,
        temperature: float,
    ) -> torch.Tensor:
        """Log-probs [rows, seq] of the response tokens, zero elsewhere. logits: [n, vocab / ranks]."""
        world = self.model.world
        own = token_logprobs(
            logits,
            rows.tokens[at.sequence, at.position],
            self.model.spec.shapes.vocabulary,
            world.tensor.group,
            temperature,
        )
        logprobs = torch.zeros_like(rows.mu_logprobs).index_put((at.sequence, at.position), own)
        if world.context.size > 1:
            # All ranks need all of a sequence's, for losses of sequences; each differentiates its own.
            whole = logprobs.detach().clone()
            dist.all_reduce(whole, group=world.context.group)
            logprobs = logprobs + (whole - logprobs.detach())
        self.guard.inspect("log-prob", logprobs, rows, logits)
        return logprobs


def _arranged_experts(rows: Batch, arrangement: Arrangement) -> torch.Tensor | None:
    """[rows, tokens, layers, top_k]: see Batch.experts."""
    experts = rows.experts
    return None if experts is None else arrangement.take(experts, no_expert(experts.dtype))
