"""Forward and backward passes: micro-batches through Megatron's pipeline schedule, log-probs out."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.data.micro_batches import (
    MicroBatch,
    group_by_length,
    padded_shapes,
    split_until,
)
from megatron_fp16rl.learner.attention import Attention
from megatron_fp16rl.learner.logprobs import token_logprobs
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.learner.nonfinite import NonFiniteGuard
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
        self.attention = Attention(model.config, model.dtype)
        self.schedule = get_forward_backward_func()

    def micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """Sequences of similar length, padded to one of few lengths, within the recipe's token budget.

        Collective over the data-parallel ranks.
        """
        world, settings = self.model.world, self.settings
        lengths, interleaved = batch.lengths.tolist(), len(self.model.chunks) > 1
        multiple = settings.length_multiple(platform.current().PAD_TO_MULTIPLE_OF)
        # The interleaved schedule mixes up varying shapes between two ranks: there all have one shape.
        groups = group_by_length(lengths, settings.micro_batch_tokens, multiple, interleaved)
        # As many on every data-parallel rank: experts are shared among them, pass by pass.
        count_on_device = torch.tensor(len(groups), device=world.device)
        dist.all_reduce(count_on_device, dist.ReduceOp.MAX, group=world.data.group)
        count = int(count_on_device)
        if interleaved:  # Megatron requires a multiple of the stages
            count = -(-count // world.pipeline.size) * world.pipeline.size
        groups = split_until(groups, lengths, count)
        if len(groups) < count:
            raise RecipeError(
                f"a data-parallel rank has {len(lengths)} sequences an update, but the pipeline "
                f"needs {count} micro-batches; raise learner.global_batch_size"
            )
        shapes = padded_shapes(groups, lengths, multiple, interleaved)
        return [MicroBatch(rows, shape) for rows, shape in zip(groups, shapes, strict=True)]

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
            data: Iterator[B], chunk: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, R]]]:
            rows = next(data)

            def finish_rows(logits: torch.Tensor) -> tuple[torch.Tensor, R]:
                return finish(self.logprobs(logits, rows, temperature), rows)

            return self.logits(rows, chunk), finish_rows

        for chunk in model.chunks:
            chunk.train(backward)
        # Generators: a micro-batch is sliced out of the batch when its turn comes.
        data = [(m.select(batch) for m in micro_batches) for _ in model.chunks]
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

    def logits(self, rows: Batch, chunk: torch.nn.Module) -> torch.Tensor:
        """[rows, seq, vocab / ranks] on the last stage, hidden states on the others.

        Padding is on the right, so a causal mask hides it.
        """
        tokens = rows.tokens
        self.attention.kernel(tokens.shape[1])  # refuses sequences that are too long for it
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if self.router_replay:
            self.router_replay.set(chunk, rows.experts)
        # Megatron would copy all logits to fp32; log-probs upcast them chunk by chunk.
        options = {} if self.model.dtype is torch.float32 else {"fp32_output": False}
        return chunk(
            input_ids=tokens,
            position_ids=positions.expand_as(tokens),
            attention_mask=None,
            **options,
        )

    def logprobs(self, logits: torch.Tensor, rows: Batch, temperature: float) -> torch.Tensor:
        """Log-probs [rows, seq] of the response tokens, zero elsewhere."""
        sequence, position = rows.mask.nonzero(as_tuple=True)
        logprobs = token_logprobs(
            logits[sequence, position - 1],  # token t is predicted at t - 1
            rows.tokens[sequence, position],
            self.model.spec.shapes.vocabulary,
            self.model.world.tensor.group,
            temperature,
        )
        logprobs = torch.zeros_like(rows.mu_logprobs).index_put((sequence, position), logprobs)
        self.guard.inspect("log-prob", logprobs, rows, logits)
        return logprobs
