"""Non-finite values stop a run: on all ranks, for the same reason, leaving files behind."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.learner.trace import LOSS, trace
from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.files import write_json

OVERFLOW_FILE = "overflow.json"
# What a forward pass reads and makes, causes before effects.
QUANTITIES = ("reward", "mu log-prob", "logit", "log-prob", "advantage", "loss")
_REMEDIES = {
    "reward": "check the task's reward",
    "mu log-prob": "the rollout server answered with it: check precision.rollout and its log",
    "advantage": "rewards are finite, so look at algorithm.advantage",
    "parameter": "an update or the initial weights put it there: go on from an earlier checkpoint "
    "(fp16rl train --resume RUN_DIRECTORY --at STEP) with a lower learner.optimizer.lr",
    LOSS: "look at the advantages and log-probs there; if they are in order, use a lower "
    "precision.loss_scale.initial in a new run (a resumed one has its checkpoint's scale)",
    "forward": "no loss scale cures the forward pass. Use precision: bf16, or a lower "
    "learner.optimizer.lr if activations grew during training",
    "stream": "what a layer adds is within fp16, the sum is not: set learner.megatron.fp32_residual_connection: true. "
    "SGLang's sum stays fp16: set precision.rollout: bf16, too",
    "backward": "if the loss scale was still above its minimum, raise max_skips, or in a new run lower "
    "precision.loss_scale.initial; else use precision: bf16. Gradients that grew in training ask for a lower "
    "learner.optimizer.lr",
    "reduction": "the ranks' gradients together are too large: look for an outlier in grad/norm and "
    "lower learner.optimizer.lr",
    "nowhere": "the same numbers gave another result: suspect a kernel that is not deterministic, or "
    "the hardware",
}


class NonFinite(FinalError):
    """A non-finite value stops the run. Raised on all ranks alike.

    files: contents for the run directory, by file name; on rank 0 only.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.files: dict[str, Any] = {}

    def save(self, folder: Path) -> None:
        """Writes the files. Collective: a rank that ends at once would have the others killed."""
        for name, value in self.files.items():
            write_json(folder / name, _for_json(value))
        dist.barrier()


class NonFiniteForward(NonFinite):
    """A reward, log-prob, advantage or loss was not finite: no loss scale can cure that."""


class NonFiniteGradient(NonFinite):
    """A gradient was not finite and there is no loss scale to lower (bf16, fp32)."""


class TooManySkips(NonFinite):
    """The loss scale fell and fell, yet gradients keep overflowing."""


class NonFiniteGuard:
    """Inspects what enters and leaves the forward pass, and raises on all ranks if any is non-finite.

    step: of the run, for the reports; None before the first.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.world = model, model.world
        self.step: int | None = None
        self._sample: dict[str, Any] | None = None  # the first that `inspect` objected to

    def inspect(
        self,
        quantity: str,
        values: torch.Tensor,
        batch: Batch,
        logits: torch.Tensor | None = None,
    ) -> None:
        """Keeps the first sample of `batch` whose values, [batch] or [batch, seq], are not finite.

        logits: what the values were computed from; named instead if not finite. Not collective: it
        runs in the midst of a pipeline's schedule, where ranks must not wait for each other.
        """
        bad = ~torch.isfinite(values.detach())
        if self._sample is not None or not bad.any():
            return
        row = int(bad.reshape(len(batch), -1).any(1).nonzero()[0])
        if logits is not None and not torch.isfinite(logits).all():
            quantity = "logit"
        per_token = values.dim() == 2  # of a logit, the log-probs computed from it
        self._sample = {
            "quantity": quantity,
            "rank": self.world.rank,
            "step": self.step,
            "values": values[row][batch.mask[row]].tolist() if per_token else values[row].item(),
            **_describe(batch, row),
        }

    def check(self, rerun: Callable[[], object] | None = None) -> None:
        """Raises NonFiniteForward on all ranks if `inspect` objected on any. Collective over the world.

        rerun: runs the same micro-batches once more, to find the origin.
        """
        objected = torch.tensor(float(self._sample is not None), device=self.world.device)
        dist.all_reduce(objected, dist.ReduceOp.MAX)
        if not objected.item():
            return
        samples = [sample for sample in self.world.gather(self._take_sample()) if sample]
        sample = min(samples, key=lambda s: (QUANTITIES.index(s["quantity"]), s["rank"]))
        quantity, rank = sample["quantity"], sample["rank"]
        when = "start" if self.step is None else f"step_{self.step:05}"
        file = f"faults/{when}.rank_{rank}.json"
        error = NonFiniteForward(
            f"a {quantity} is not finite on rank {rank}. This is no gradient overflow: the "
            f"loss scale was left alone\nthe sample: {file} in the run directory"
        )
        if self.world.is_rank0:
            error.files[file] = sample
        if rerun is None:
            error.args = (f"{error}\nremedy: {_REMEDIES[quantity]}",)
        else:
            self.explain(error, rerun)
        raise error

    def explain(self, error: NonFinite, rerun: Callable[[], object], **facts: float) -> None:
        """Adds the origin of the first non-finite value to an error and its files.

        facts: more of the update, for the file. Collective over the world.
        """

        def rerun_and_take() -> str | None:
            rerun()
            sample = self._take_sample()
            return sample["quantity"] if sample else None

        origin, layers = trace(self.model, rerun_and_take)
        limit = torch.finfo(self.model.dtype).max
        if self.world.is_rank0:
            report = {"reason": str(error), "step": self.step, **facts, "origin": origin.as_dict()}
            error.files[OVERFLOW_FILE] = {**report, "limit": limit, "layers": layers}
        largest_first = sorted(layers, key=lambda row: -max(row["activation"], row["gradient"]))
        near = [
            f"{row['layer']} (activations {row['activation']:.5g}, scaled gradients {row['gradient']:.5g})"
            for row in largest_first[:3]
        ]
        in_stream = origin.kind == "forward" and origin.in_residual_stream
        cause = LOSS if origin.module == LOSS else "stream" if in_stream else origin.kind
        remedy = _REMEDIES[cause]
        in_pass = origin.kind in ("forward", "backward") and origin.module != LOSS
        if in_pass and self.model.dtype is not torch.float16:
            remedy = "a lower learner.optimizer.lr, if what is nearest grew during training"
        error.args = (
            f"{error}\n{origin}\nnearest to {limit:g}: {', '.join(near)}\nremedy: {remedy}\n"
            f"details: {OVERFLOW_FILE} in the run directory",
        )

    def _take_sample(self) -> dict[str, Any] | None:
        sample, self._sample = self._sample, None
        return sample


def _describe(batch: Batch, row: int) -> dict[str, Any]:
    """One sequence of a batch, as plain values."""
    mask, length = batch.mask[row], int(batch.lengths[row])
    start = int(mask.nonzero()[0]) if mask.any() else length
    tokens = batch.tokens[row, :length].tolist()
    sample: dict[str, Any] = {
        "prompt_ids": tokens[:start],
        "response_ids": tokens[start:],
        "response_mask": mask[start:length].tolist(),
        "reward": batch.rewards[row].item(),
        "group": int(batch.groups[row]),
        "truncated": bool(batch.truncated[row]),
    }
    for name in ("advantages", "mu_logprobs", "pi_logprobs"):
        values = batch.tensors().get(name)
        sample[name] = None if values is None else values[row][mask].tolist()
    return sample


def _for_json(value: Any) -> Any:
    """The same with numbers that JSON does not have as strings: "inf", "-inf", "nan"."""
    if isinstance(value, dict):
        return {key: _for_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
