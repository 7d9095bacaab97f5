"""The learner of one rank: scores batches, learns from them, exports its weights."""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_fp16rl.algorithms import Algorithm
from megatron_fp16rl.algorithms.losses import Losses, negative_log_likelihood
from megatron_fp16rl.data.batch import Batch, ScoredBatch, TrainBatch
from megatron_fp16rl.data.micro_batches import split_updates
from megatron_fp16rl.learner import exchange
from megatron_fp16rl.learner.ddp import gather_parameters
from megatron_fp16rl.learner.export import Export, drain, gather
from megatron_fp16rl.learner.forward import Forward
from megatron_fp16rl.learner.loading import load
from megatron_fp16rl.learner.loss_scale import LossScaler
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.learner.nonfinite import NonFinite, NonFiniteGuard
from megatron_fp16rl.learner.optimizer import Optimizer, UpdateOutcome
from megatron_fp16rl.learner.outcome import Outcome, summarise
from megatron_fp16rl.learner.reference import Reference
from megatron_fp16rl.learner.router_replay import RouterReplay
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.costs import costs
from megatron_fp16rl.models.folder import HFFolder, write_adapter, write_folder
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.parallel import World
from megatron_fp16rl.recipe import TORCH_DTYPES, Precision, Recipe
from megatron_fp16rl.recipe import Optimizer as OptimizerSettings
from megatron_fp16rl.recipe.learner import Learner as LearnerSettings

B = TypeVar("B", bound=Batch)


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
        config = load_config(hf_dir)
        self.costs = costs(config)
        self.model = Model(
            describe(config, world.layout),
            precision.dtype,
            world,
            settings.distributed_optimizer,
            settings.megatron,
            settings.lora,
            settings.ddp,
            precision.head,
        )
        self.guard = NonFiniteGuard(self.model)
        self.router_replay = RouterReplay(self.model) if router_replay else None
        self.forward = Forward(self.model, settings, self.guard, self.router_replay)
        self._algorithm = algorithm
        self._reference: Reference | None = None
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
        learner.forward.attention.kernel(rollout.max_new_tokens)
        return learner

    @property
    def algorithm(self) -> Algorithm:
        assert self._algorithm is not None, "a learner without an algorithm only scores"
        return self._algorithm

    def begin_step(self, step: int) -> None:
        """Sets the step that reports of non-finite values name."""
        self.guard.step = step

    def load(self, folder: Path) -> None:
        """Loads the weights of a Hugging Face folder; resets optimizer and loss scale."""
        load(self.model, HFFolder(folder))
        self.reset_optimizer(self.settings.optimizer, self.total_updates)

    def reset_optimizer(self, settings: OptimizerSettings, total_updates: int) -> None:
        """Makes a new optimizer for the current weights, and a new loss scale."""
        self.scaler: LossScaler | None = None
        if self.precision.dtype == "fp16":  # the other dtypes have the range of fp32
            self.scaler = LossScaler(self.precision.loss_scale, self.world.device)
        self.optimizer = Optimizer(settings, self.model, total_updates, self.scaler)
        self.model.config.grad_scale_func = self.scaler.scale_loss if self.scaler else None

    def share(self, batch: Batch | None) -> Batch:
        """The leader's batch on all ranks of its replica; ignored on the others.

        It moves to their device; records of experts stay on the host, those of a rank's own layers.
        """
        layers = self.router_replay.layers if self.router_replay else None
        return exchange.from_leader(batch, self.world, layers)

    def keep_reference(self) -> None:
        """Snapshots the current weights to host memory as the reference policy."""
        self._reference = Reference(self.model)

    @torch.no_grad()
    def score(self, batch: Batch, temperature: float | None = None) -> ScoredBatch:
        """Adds pi_logprobs, at the sampling temperature if none is given.

        Adds reference_logprobs as well, for training, if there is a reference. Raises
        NonFiniteForward.
        """
        pi_logprobs = self._score(batch, temperature or self.temperature)
        if self._reference is None or temperature is not None:
            return batch.scored(pi_logprobs)
        with self._reference.in_place():
            return batch.scored(pi_logprobs, self._score(batch, self.temperature))

    @torch.no_grad()
    def score_in_other_company(self, batch: Batch, temperature: float) -> torch.Tensor | None:
        """Log-probs [batch, seq] once more, in micro-batches of other sequences.

        Of every second sequence at a time. None where that leaves a pipeline too few of them.
        """
        multiple = self.world.layout.sequences_multiple
        too_few = len(batch) < 2 * self.world.pipeline.size
        if too_few or (multiple > 1 and len(batch) % (2 * multiple)):
            return None
        logprobs = torch.zeros_like(batch.mu_logprobs)
        for first in range(2):
            half = torch.arange(first, len(batch), 2, device=logprobs.device)
            part = self._score(batch.rows(half), temperature)
            logprobs[half, : part.shape[1]] = part
        return logprobs

    def _score(self, batch: Batch, temperature: float) -> torch.Tensor:
        """Log-probs [batch, seq] of the response tokens, on every rank."""

        def finish(logprobs: torch.Tensor, rows: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            return logprobs.new_zeros(()), logprobs  # Megatron's schedule wants a loss

        micro_batches = self.forward.micro_batches(batch)
        run = functools.partial(
            self.forward.run, batch, micro_batches, finish, temperature, backward=False
        )
        parts = run()
        self.guard.check(run)
        # Micro-batches have sequences in another order: each row goes back to its place in the batch.
        logprobs = torch.zeros_like(batch.mu_logprobs)
        if self.world.is_last_stage:
            for micro_batch, part in zip(micro_batches, parts, strict=True):
                logprobs[micro_batch.sequences, : part.shape[1]] = part
        # Only the last stage has logits; losses and metrics are computed on all.
        pipeline = self.world.pipeline
        if pipeline.size > 1:
            dist.broadcast(logprobs, group=pipeline.group, group_src=pipeline.size - 1)
        return logprobs

    def prepare(self, scored: ScoredBatch) -> TrainBatch:
        """Adds advantages. Raises NonFiniteForward if these, rewards or mu log-probs are not finite."""
        batch = self.algorithm.prepare(scored, self.world.data.group)
        self.guard.inspect("reward", batch.rewards, batch)
        self.guard.inspect("mu log-prob", batch.mu_logprobs, batch)
        self.guard.inspect("advantage", batch.advantages, batch)
        self.guard.check()
        return batch

    def update(self, batch: TrainBatch, step: int) -> Outcome:
        """One pass over the batch in optimizer updates of `learner.global_batch_size` sequences."""
        data, size = self.world.data, self.settings.global_batch_size
        # 1. Which sequences make an update: a shuffle of the whole step's, seeded by the step, so that
        #    it depends neither on the number of data-parallel ranks nor on a resume.
        lengths = exchange.all_lengths(batch.lengths, data)
        order = list(range(len(lengths)))
        random.Random(f"{self.seed}/{step}/updates").shuffle(order)
        # 2. Which rank learns from which: split again for each update, so that all have the same work.
        shares = split_updates([self.costs.work(n) for n in lengths], order, size, data.size)
        batch = exchange.redistribute(batch, shares, max(lengths), self.world)
        # 3. The updates, one optimizer step each; an FP16 overflow skips that one only.
        outcomes: list[UpdateOutcome] = []
        losses: list[float] = []
        sums: dict[str, float] = {}
        first_update: list[TrainBatch] = []

        def token_losses(logprobs: torch.Tensor, rows: TrainBatch) -> Losses:
            # Until the first optimizer step the forward pass gives what a score pass would have given.
            if batch.pi_logprobs is None and not outcomes:
                first_update.append(rows.replace(pi_logprobs=logprobs.detach()))
            return self.algorithm.token_losses(logprobs, rows)

        for rows in torch.arange(len(batch)).split(size // data.size):
            part = batch.rows(rows)
            outcome, loss, stats = self.train_update(
                part, token_losses, self.algorithm.normaliser(part)
            )
            outcomes.append(outcome)
            losses.append(loss)
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value
        gather_parameters(self.model.chunks)
        summary = summarise(outcomes, losses, sums, self.scaler)
        if first_update:
            summary = replace(summary, first_update=TrainBatch.joined(first_update))
        return summary

    def train_update(
        self,
        batch: B,
        token_losses: Callable[[torch.Tensor, B], tuple[torch.Tensor, dict[str, torch.Tensor]]],
        normaliser: torch.Tensor,
    ) -> tuple[UpdateOutcome, float, dict[str, float]]:
        """Forward, backward and one optimizer step on this data-parallel rank's share of an update.

        token_losses: of log-probs [rows, seq] and their micro-batch: losses [rows, seq], and sums to log.
        The loss is the sum of token losses over all ranks divided by the sum of `normaliser` over
        all ranks, however the sequences are split into micro-batches and ranks. Returns the outcome,
        the loss, and the global sums of the logged statistics with "tokens" among them. Raises
        NonFiniteForward, and what Optimizer.step raises, with its origin. With `learner.ddp` the parameters
        may still be to be gathered; see gather_parameters.
        """
        world = self.world
        # 1. The divisor of the loss is global, and known before the first backward pass: so the update does
        #    not depend on how its sequences are split.
        total = normaliser.clone()
        dist.all_reduce(total, group=world.data.group)
        micro_batches = self.forward.micro_batches(batch)
        # Megatron divides by the micro-batches in its schedule and by the ranks in its gradients.
        weight = len(micro_batches) * world.data.size / total.clamp(min=1e-8)

        def finish(logprobs: torch.Tensor, rows: B) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            losses, stats = token_losses(logprobs, rows)
            self.guard.inspect("loss", losses, rows)
            loss = losses.sum()
            # Megatron divides the loss in place: what is logged must be a copy.
            sums = {"loss": loss.detach().clone(), "tokens": rows.mask.sum().float()}
            return loss * weight, {**sums, **{n: v.detach().float() for n, v in stats.items()}}

        def run() -> list[dict[str, torch.Tensor]]:
            self.optimizer.zero_grad()
            return self.forward.run(batch, micro_batches, finish, self.temperature, backward=True)

        # 2. Gradients. A non-finite value of the forward pass is no overflow, and no lower scale cures it:
        #    it is looked for first, and ends the run.
        parts = run()
        self.guard.check(run)
        # 3. Statistics: the last stage has them, summed over micro-batches and data-parallel ranks.
        stats: dict[str, float] = {}
        if world.is_last_stage:
            sums = torch.stack([torch.stack(list(part.values())) for part in parts]).sum(0)
            run_tokens = sums.new_tensor([m.tokens for m in micro_batches]).sum()
            sums = torch.stack([*sums, batch.lengths.sum().to(sums), run_tokens])
            dist.all_reduce(sums, group=world.data.group)
            names = *parts[0], "sequence_tokens", "run_tokens"
            stats = dict(zip(names, sums.tolist(), strict=True))
        stats = world.broadcast_from_last_stage(stats)
        loss = stats.pop("loss") / total.item()
        # 4. Unscale, check, clip, step; or skip, on every rank alike.
        #    If the run ends here, the same micro-batches run once more to find the origin.
        return self._step_optimizer(run), loss, stats

    def _step_optimizer(self, run: Callable[[], object]) -> UpdateOutcome:
        """The optimizer's step; if it gives up, another `run` finds the origin of the overflow."""
        scale = self.scaler.scale if self.scaler else None
        try:
            return self.optimizer.step()
        except NonFinite as error:
            facts = {}
            if self.scaler and scale is not None:
                self.scaler.scale = scale  # as it was when the gradients overflowed
                facts = {"loss_scale": scale.item()}
            self.guard.explain(error, run, **facts)
            raise

    def supervised_update(self, batch: Batch) -> tuple[UpdateOutcome, float]:
        """One update on the mean negative log-likelihood of the response tokens."""

        def token_losses(
            logprobs: torch.Tensor, rows: Batch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return negative_log_likelihood(logprobs, rows.mask), {}

        outcome, loss, _ = self.train_update(batch, token_losses, batch.mask.sum().float())
        gather_parameters(self.model.chunks)
        return outcome, loss

    @functools.cached_property
    def exported(self) -> Export:
        """The weights, for the servers."""
        return Export(self.model, getattr(torch, TORCH_DTYPES[self.precision.served]))

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors for the servers: Hugging Face names, a fixed order, on rank 0; see Export."""
        return self.exported.whole()

    def save(self, folder: Path, hf_dir: Path) -> None:
        """Writes a Hugging Face folder with the configuration and tokenizer of `hf_dir`."""
        dtype = TORCH_DTYPES[self.precision.dtype]
        self._write(
            Export(self.model).whole(), functools.partial(write_folder, folder, hf_dir, dtype)
        )

    def save_adapter(self, folder: Path, base: str) -> None:
        """Writes the adapters alone, in PEFT's format. base: path or name of the model they are for."""
        model, lora = self.model, self.settings.lora
        assert lora is not None
        tensors = gather(model, model.adapters, torch.Tensor.detach, model.dtype)
        self._write(tensors, functools.partial(write_adapter, folder, base, lora))

    def _write(
        self, tensors: Iterator[tuple[str, torch.Tensor]], write: Callable[..., object]
    ) -> None:
        """Rank 0 writes what is gathered there; the others take part in the gathering."""
        if self.world.is_rank0:
            write(tensors)
        else:
            drain(tensors)
        dist.barrier()  # when any rank returns, the folder is complete
