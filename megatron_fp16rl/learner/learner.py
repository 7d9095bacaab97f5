"""The learner of one rank: scores batches, learns from them, exports its weights."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_fp16rl import platform
from megatron_fp16rl.algorithms import Algorithm
from megatron_fp16rl.algorithms.losses import negative_log_likelihood
from megatron_fp16rl.data.batch import Batch, ScoredBatch, TrainBatch
from megatron_fp16rl.data.micro_batches import (
    MicroBatch,
    group_by_length,
    padded_shapes,
    split_until,
    split_updates,
)
from megatron_fp16rl.learner import exchange
from megatron_fp16rl.learner.attention import Attention
from megatron_fp16rl.learner.logprobs import token_logprobs
from megatron_fp16rl.learner.loss_scale import LossScaler
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.learner.nonfinite import Faults, NonFinite
from megatron_fp16rl.learner.optimizer import Optimizer, StepOutcome
from megatron_fp16rl.learner.reference import Reference
from megatron_fp16rl.learner.router_replay import RouterReplay
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder, write_adapter, write_folder
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import TORCH_DTYPES, Precision, Recipe, RecipeError
from megatron_fp16rl.recipe import Optimizer as OptimizerSettings
from megatron_fp16rl.recipe.learner import Learner as LearnerSettings

# token losses [batch, seq] of log-probs [batch, seq], and sums worth logging
TokenLosses = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


# Metrics that are means over response tokens, by the name of the sum in the loss's statistics. Those of a
# user's loss are loss/NAME.
_A_TOKEN = {
    "clipped": "loss/clip_fraction",
    "kl": "loss/kl",
    "corrected": "correction/fraction",
    "weight": "correction/weight_mean",
}


@dataclass(frozen=True)
class Outcome:
    """What the updates on one rollout batch did."""

    stepped: bool  # at least one update was not skipped: the weights changed
    metrics: dict[str, float | str | None]


class Learner:
    """One rank of the learner. Every method is collective over the world."""

    def __init__(
        self,
        hf_dir: Path,
        world: World,
        settings: LearnerSettings,
        precision: Precision,
        *,
        algorithm: Algorithm | None = None,
        temperature: float = 1.0,
        total_updates: int = 1,
        router_replay: bool = False,
        seed: int = 0,
    ) -> None:
        """hf_dir: a Hugging Face folder with the initial weights.

        algorithm: None for a learner that only scores, or learns supervised. temperature: that of
        sampling. total_updates: the end of the learning-rate schedule. router_replay: whether batches
        record experts that are to be replayed. seed: of the order of sequences in a step's updates.
        """
        self.hf_dir, self.world = hf_dir, world
        self.settings, self.precision = settings, precision
        self.temperature, self.total_updates, self.seed = temperature, total_updates, seed
        self.model = Model(
            describe(load_config(hf_dir), world.layout),
            precision.dtype,
            world,
            settings.distributed_optimizer,
            settings.megatron,
            settings.lora,
        )
        self.attention = Attention(self.model.config, self.model.dtype)
        self.replay = RouterReplay(self.model) if router_replay else None
        self.faults = Faults(self.model)
        self.algorithm = algorithm
        self._reference: Reference | None = None
        self.forward_backward = get_forward_backward_func()
        self.load(hf_dir)

    @classmethod
    def from_recipe(cls, recipe: Recipe, hf_dir: Path, world: World) -> "Learner":
        """The learner that a recipe describes. Raises RecipeError for responses too long for it."""
        rollout, settings = recipe.rollout, recipe.learner
        updates_per_step = rollout.prompts * rollout.samples // settings.global_batch_size
        learner = cls(
            hf_dir,
            world,
            settings,
            recipe.precision,
            algorithm=Algorithm(recipe.algorithm, rollout.max_new_tokens),
            temperature=rollout.temperature,
            total_updates=updates_per_step * recipe.trainer.steps,
            router_replay=rollout.router_replay,
            seed=recipe.trainer.seed,
        )
        learner.attention.kernel(rollout.max_new_tokens)
        return learner

    def begin_step(self, step: int) -> None:
        """Sets the step that reports of non-finite values name."""
        self.faults.step = step

    def load(self, folder: Path) -> None:
        """Takes the weights of a Hugging Face folder, with fresh optimizer and loss scale."""
        self.model.load(HFFolder(folder))
        self.reset_optimizer(self.settings.optimizer, self.total_updates)

    def reset_optimizer(self, settings: OptimizerSettings, total_updates: int) -> None:
        """A fresh optimizer over the present weights, and a fresh loss scale."""
        scaled = self.precision.dtype == "fp16"
        self.scaler = LossScaler(self.precision.loss_scale, self.world.device) if scaled else None
        self.optimizer = Optimizer(
            settings,
            self.model,
            self.precision.dtype,
            self.settings.distributed_optimizer,
            total_updates,
            self.scaler,
        )
        self.model.config.grad_scale_func = self.scaler.scale_loss if self.scaler else None

    def share(self, batch: Batch | None) -> Batch:
        """A leader's batch on all ranks of its replica, as they use it; not looked at elsewhere.

        On their device, but for records of experts: of its own layers alone each has them, on the host.
        """
        return exchange.from_leader(batch, self.world, self.replay and self.replay.layers)

    @torch.no_grad()
    def score(self, batch: Batch, temperature: float | None = None) -> ScoredBatch:
        """Adds pi_logprobs, at the recipe's sampling temperature if none is given.

        Adds reference_logprobs as well, for training, if there is a reference. Raises
        NonFiniteForward.
        """
        pi_logprobs = self._score(batch, temperature)
        if self._reference is None or temperature is not None:
            return batch.scored(pi_logprobs)
        with self._reference.in_place():
            return batch.scored(pi_logprobs, self._score(batch))

    def keep_reference(self) -> None:
        """Takes the present weights for those of the reference policy."""
        self._reference = Reference(self.model)

    def _score(self, batch: Batch, temperature: float | None = None) -> torch.Tensor:
        """Log-probs [batch, seq] of the response tokens, on every rank."""
        parts = self._micro_batches(batch)
        step = partial(self._score_step, temperature or self.temperature)
        run = partial(self._run, batch, parts, step, backward=False)
        scored = run()
        self.faults.check(run)
        found = torch.zeros_like(batch.mu_logprobs)
        if self.world.is_last_stage:
            for part, logprobs in zip(parts, scored, strict=True):
                seq = min(logprobs.shape[1], found.shape[1])
                found[part.sequences, :seq] = logprobs[: len(part.sequences), :seq]
        pipeline = self.world.pipeline
        if pipeline.size > 1:
            dist.broadcast(found, group=pipeline.group, group_src=pipeline.size - 1)
        return found

    def prepare(self, scored: ScoredBatch) -> TrainBatch:
        """Adds advantages. Raises NonFiniteForward if these, rewards or mu log-probs are not finite."""
        batch = self.algorithm.prepare(scored, self.world.data.group)
        self.faults.inspect("reward", batch.rewards, batch)
        self.faults.inspect("mu log-prob", batch.mu_logprobs, batch)
        self.faults.inspect("advantage", batch.advantages, batch)
        self.faults.check()
        return batch

    def update(self, batch: TrainBatch, step: int) -> Outcome:
        """One pass over the batch in optimizer updates of `learner.global_batch_size` sequences.

        Which sequences make an update does not depend on the number of data-parallel ranks; they
        are dealt to these anew for each, so that all have the same work.
        """
        data, size = self.world.data, self.settings.global_batch_size
        lengths = exchange.everywhere(batch.lengths, data)
        order = list(range(len(lengths)))
        random.Random(f"{self.seed}/{step}/updates").shuffle(order)
        shares = split_updates(lengths, order, size, data.size)
        batch = exchange.moved(batch, shares, max(lengths), self.world)
        outcomes, losses, sums = [], [], {}
        for rows in torch.arange(len(batch)).split(size // data.size):
            part = batch.rows(rows)
            outcome, loss, stats = self.train_step(
                part, self.algorithm.token_losses, self.algorithm.normaliser(part)
            )
            outcomes.append(outcome)
            losses.append(loss)
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value
        return self._summarise(outcomes, losses, sums)

    def train_step(
        self, batch: Batch, token_losses: TokenLosses, normaliser: torch.Tensor
    ) -> tuple[StepOutcome, float, dict[str, float]]:
        """Forward, backward and one optimizer step on this data-parallel rank's share of an update.

        The loss is the sum of token losses over all ranks divided by the sum of `normaliser` over
        all ranks, however the sequences are cut into micro-batches and ranks. Returns the outcome,
        the loss, and the global sums of the logged statistics with "tokens" among them. Raises
        NonFiniteForward, and what Optimizer.step raises, with where it began.
        """
        total = normaliser.clone()
        dist.all_reduce(total, group=self.world.data.group)
        parts = self._micro_batches(batch)
        # Megatron divides by the micro-batches in its schedule and by the ranks in its gradients.
        weight = len(parts) * self.world.data.size / total.clamp(min=1e-8)
        step = partial(self._loss_step, token_losses, weight)

        def run() -> list[object]:
            self.optimizer.zero_grad()
            return self._run(batch, parts, step, backward=True)

        done = run()
        self.faults.check(run)
        stats = {}
        if self.world.is_last_stage:
            sums = torch.stack([torch.stack(list(stats.values())) for stats in done]).sum(0)
            dist.all_reduce(sums, group=self.world.data.group)
            stats = dict(zip(done[0], sums.tolist(), strict=True))
        stats = self.world.broadcast_from_last_stage(stats)
        loss = stats.pop("loss") / total.item()
        return self._step(run), loss, stats

    def _step(self, run: Callable) -> StepOutcome:
        """The optimizer's step; if it gives up, what it says is explained by another `run`."""
        scale = self.scaler.scale if self.scaler else None
        try:
            return self.optimizer.step()
        except NonFinite as error:
            facts = {}
            if self.scaler:
                self.scaler.scale = scale  # as it was when the gradients overflowed
                facts = {"loss_scale": scale.item()}
            self.faults.explain(error, run, **facts)
            raise

    def supervised_step(self, batch: Batch) -> tuple[StepOutcome, float]:
        """One update on the mean negative log-likelihood of the response tokens."""

        def token_losses(
            logprobs: torch.Tensor, rows: Batch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return negative_log_likelihood(logprobs, rows.mask), {}

        outcome, loss, _ = self.train_step(batch, token_losses, batch.mask.sum().float())
        return outcome, loss

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights for the servers: Hugging Face names, a fixed order, on rank 0; see Model.export."""
        return self.model.export(getattr(torch, TORCH_DTYPES[self.precision.served]))

    def save(self, folder: Path, like: Path) -> None:
        """Writes a Hugging Face folder with the configuration and tokenizer of `like`."""
        tensors = self.model.export()
        if self.world.is_rank0:
            write_folder(folder, like, TORCH_DTYPES[self.precision.dtype], tensors)
        else:
            for _ in tensors:
                pass  # takes part in the gathering
        dist.barrier()

    def save_adapter(self, folder: Path, base: str) -> None:
        """Writes the adapters alone, in PEFT's format. base: path or name of the model they are for."""
        tensors = self.model.gather(torch.Tensor.detach, self.model.dtype)
        if self.world.is_rank0:
            write_adapter(folder, base, self.settings.lora, tensors)
        else:
            for _ in tensors:
                pass  # takes part in the gathering
        dist.barrier()

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """Parts of sequences of like length, each padded to one of few lengths and within the recipe's token budget.

        As many parts on every data-parallel rank, because experts are shared among them. Where stages
        are interleaved, a multiple of the stages, because Megatron asks for it, and all of one shape,
        because its schedule mixes up varying ones between two ranks.
        """
        lengths, interleaved = batch.lengths.tolist(), len(self.model.chunks) > 1
        multiple = self.settings.length_multiple(platform.current().PAD_TO_MULTIPLE_OF)
        parts = group_by_length(lengths, self.settings.micro_batch_tokens, multiple, interleaved)
        count = torch.tensor(len(parts), device=self.world.device)
        dist.all_reduce(count, dist.ReduceOp.MAX, group=self.world.data.group)
        wanted = int(count)
        if interleaved:
            wanted = -(-wanted // self.world.pipeline.size) * self.world.pipeline.size
        parts = split_until(parts, lengths, wanted)
        if len(parts) < wanted:
            raise RecipeError(
                f"a data-parallel rank has {len(lengths)} sequences an update, but the pipeline "
                f"needs {wanted} micro-batches; raise learner.global_batch_size"
            )
        shapes = padded_shapes(parts, lengths, multiple, interleaved)
        return [MicroBatch(*both) for both in zip(parts, shapes, strict=True)]

    def _run(
        self, batch: Batch, parts: list[MicroBatch], forward_step: Callable, backward: bool
    ) -> list[object]:
        """Megatron's schedule over micro-batches of `batch`.

        Returns what the loss function returned for each, on the last pipeline stage.
        """
        for chunk in self.model.chunks:
            chunk.train(backward)
        several = len(self.model.chunks) > 1
        # Iterators: a micro-batch is cut out when its turn comes.
        data = [(part.select(batch) for part in parts) for _ in self.model.chunks]
        return self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=data if several else data[0],
            model=self.model.chunks,
            num_microbatches=len(parts),
            seq_length=max(seq for _, seq in (part.shape for part in parts)),
            micro_batch_size=max(rows for rows, _ in (part.shape for part in parts)),
            forward_only=not backward,
        )

    def _score_step(
        self, temperature: float, data: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable]:
        rows = next(data)
        logits = self._logits(rows, model)

        def collect(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logprobs = self._logprobs(logits, rows, temperature)
            return logprobs.new_zeros(()), logprobs

        return logits, collect

    def _loss_step(
        self,
        token_losses: TokenLosses,
        weight: torch.Tensor,
        data: Iterator[Batch],
        model: torch.nn.Module,
    ) -> tuple[torch.Tensor, Callable]:
        rows = next(data)
        logits = self._logits(rows, model)

        def loss_function(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            losses, stats = token_losses(self._logprobs(logits, rows, self.temperature), rows)
            self.faults.inspect("loss", losses, rows)
            loss = losses.sum()
            # Megatron divides the loss in place: what is logged must be a copy.
            logged = {
                "loss": loss.detach().clone(),
                "tokens": rows.mask.sum().float(),
                **{name: value.detach().float() for name, value in stats.items()},
            }
            return loss * weight, logged

        return logits, loss_function

    def _logits(self, rows: Batch, model: torch.nn.Module) -> torch.Tensor:
        """[batch, seq, vocab / ranks] on the last stage, hidden states on the others.

        Padding is on the right, so a causal mask hides it. seq: of the `MicroBatch`, so that sequence
        parallelism can cut it.
        """
        tokens = rows.tokens
        self.attention.kernel(tokens.shape[1])
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if self.replay:
            self.replay.set(model, rows.experts)
        # Megatron would make an fp32 copy of all logits; log-probs are made of them chunk by chunk.
        options = {} if self.model.dtype is torch.float32 else {"fp32_output": False}
        return model(
            input_ids=tokens,
            position_ids=positions.expand_as(tokens),
            attention_mask=None,
            **options,
        )

    def _logprobs(self, logits: torch.Tensor, rows: Batch, temperature: float) -> torch.Tensor:
        """Log-probs [batch, seq] of the response tokens, zero elsewhere."""
        sequence, position = rows.mask.nonzero(as_tuple=True)
        logprobs = token_logprobs(
            logits[sequence, position - 1],
            rows.tokens[sequence, position],
            self.model.spec.shapes.vocabulary,
            self.world.tensor.group,
            temperature,
        )
        logprobs = torch.zeros_like(rows.mu_logprobs).index_put((sequence, position), logprobs)
        self.faults.inspect("log-prob", logprobs, rows, logits)
        return logprobs

    def _summarise(
        self, outcomes: list[StepOutcome], losses: list[float], sums: dict[str, float]
    ) -> Outcome:
        good = [o for o in outcomes if o.stepped]
        skipped = [o for o in outcomes if not o.stepped]
        metrics: dict[str, float | str | None] = {
            "loss/policy": sum(losses) / len(losses),
            **{
                _A_TOKEN.get(name, f"loss/{name}"): value / sums["tokens"]
                for name, value in sums.items()
                if name != "tokens"
            },
            "grad/norm": sum(o.grad_norm for o in good) / len(good) if good else None,
            "lr": good[-1].lr if good else None,
            "updates": len(good),
            "fp16/overflow_source": skipped[-1].overflow_source if skipped else None,
        }
        if self.scaler is not None:
            metrics["fp16/loss_scale"] = self.scaler.scale.item()
            underflows = [o.underflow_fraction for o in good]
            metrics["fp16/grad_underflow_fraction"] = (
                sum(underflows) / len(underflows) if underflows else None
            )
            metrics["fp16/skipped_total"] = self.scaler.skipped_total
            metrics["fp16/skipped_in_a_row"] = self.scaler.skipped_in_a_row
        return Outcome(stepped=bool(good), metrics=metrics)
