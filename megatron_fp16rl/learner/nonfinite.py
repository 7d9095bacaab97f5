"""Values that are not finite stop a run: on all ranks, for the same reason, leaving files behind."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.learner.forensics import THE_LOSS, Report, watch
from megatron_fp16rl.learner.model import Model
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
    THE_LOSS: "look at the advantages and log-probs there; if they are in order, use a lower "
    "precision.loss_scale.initial in a new run (a resumed one has its checkpoint's scale)",
    "forward": "no loss scale cures the forward pass. Use precision: bf16, or a lower "
    "learner.optimizer.lr if activations grew during training",
    "backward": "if the loss scale was still above its minimum, raise max_skips, or in a new run lower "
    "precision.loss_scale.initial; else use precision: bf16. Gradients that grew in training ask for a lower "
    "learner.optimizer.lr",
    "reduction": "the ranks' gradients together are too large: look for an outlier in grad/norm and "
    "lower learner.optimizer.lr",
    "nowhere": "the same numbers gave another result: suspect a kernel that is not deterministic, or "
    "the hardware",
}


class NonFinite(FinalError):
    """A value that is not finite stops the run. Raised on all ranks alike.

    files: what is to be kept in the run directory, by name; rank 0 alone has any.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.files: dict[str, object] = {}

    def save(self, folder: Path) -> None:
        """Writes the files. Collective: a rank that ends at once would have the others killed."""
        for name, value in self.files.items():
            write_json(folder / name, _plain(value))
        dist.barrier()


class NonFiniteForward(NonFinite):
    """A reward, log-prob, advantage or loss was not finite: no loss scale can cure that."""


class NonFiniteGradient(NonFinite):
    """A gradient was not finite and no loss scale can be lowered (bf16, fp32)."""


class TooManySkips(NonFinite):
    """The loss scale fell and fell, yet gradients keep overflowing."""


class Faults:
    """What this rank has seen that is not finite.

    step   of the run, for the reports; None before the first
    """

    def __init__(self, model: Model) -> None:
        self.model, self.world = model, model.world
        self.step: int | None = None
        self._sample: dict[str, object] | None = None

    def inspect(
        self,
        quantity: str,
        values: torch.Tensor,
        rows: Batch,
        logits: torch.Tensor | None = None,
    ) -> None:
        """Remembers the first sample of `rows` whose values, [batch] or [batch, seq], are not finite.

        logits: what the values were made of; blamed in their place if not finite.
        """
        bad = ~torch.isfinite(values.detach())
        if self._sample is not None or not bad.any():
            return
        row = int(bad.reshape(len(rows), -1).any(1).nonzero()[0])
        if logits is not None and not torch.isfinite(logits).all():
            quantity = "logit"
        self._sample = {
            "quantity": quantity,
            "rank": self.world.rank,
            "step": self.step,
            # Of a logit, the log-probs that were made with it.
            "values": values[row][rows.mask[row]].tolist()
            if values.dim() == 2
            else values[row].item(),
            **_sample(rows, row),
        }

    def check(self, rerun: Callable[[], object] | None = None) -> None:
        """Raises NonFiniteForward on all ranks if `inspect` has found something on any.

        rerun: runs the same micro-batches once more. Collective over the world.
        """
        seen = torch.tensor(self._sample is not None, dtype=torch.float32, device=self.world.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        if not seen.item():
            return
        everywhere: list[dict | None] = [None] * self.world.size
        dist.all_gather_object(everywhere, self._take())
        sample = min(
            (found for found in everywhere if found),
            key=lambda found: (QUANTITIES.index(found["quantity"]), found["rank"]),
        )
        quantity = sample["quantity"]
        when = "start" if self.step is None else f"step_{self.step:05}"
        file = f"faults/{when}.rank_{sample['rank']}.json"
        error = NonFiniteForward(
            f"a {quantity} is not finite on rank {sample['rank']}. This is no gradient overflow: the "
            f"loss scale was left alone\nthe sample: {file} in the run directory"
        )
        if self.world.is_rank0:
            error.files[file] = sample
        if rerun is None:
            error.args = (f"{error}\nremedy: {_REMEDIES[quantity]}",)
        else:
            self.explain(error, rerun)
        raise error

    def explain(self, error: NonFinite, rerun: Callable[[], object], **facts: object) -> None:
        """Adds to an error, and to its files, where the first value that is not finite is born.

        facts: of the update, for the file. Collective over the world.
        """

        def watched() -> str | None:
            rerun()
            sample = self._take()
            return sample and sample["quantity"]

        report = watch(self.model, watched)
        if self.world.is_rank0:
            about = {"reason": str(error), "step": self.step, **facts}
            error.files[OVERFLOW_FILE] = {**about, **report.as_dict()}
        remedy = _remedy(report, self.model.dtype)
        lines = [str(error), *report.lines(), f"remedy: {remedy}"]
        error.args = ("\n".join([*lines, f"details: {OVERFLOW_FILE} in the run directory"]),)

    def _take(self) -> dict[str, object] | None:
        sample, self._sample = self._sample, None
        return sample


def _remedy(report: Report, dtype: torch.dtype) -> str:
    born = report.born
    if born.module == THE_LOSS:
        return _REMEDIES[THE_LOSS]
    if born.kind in ("forward", "backward") and dtype is not torch.float16:
        return "a lower learner.optimizer.lr, if what is nearest to the limit grew during training"
    return _REMEDIES[born.kind]


def _sample(rows: Batch, row: int) -> dict[str, object]:
    """One sequence of a batch, as plain values."""
    mask = rows.mask[row]
    length = int(rows.lengths[row])
    start = int(mask.nonzero()[0]) if mask.any() else length
    tokens = rows.tokens[row, :length].tolist()
    sample = {
        "prompt_ids": tokens[:start],
        "response_ids": tokens[start:],
        "reward": rows.rewards[row].item(),
        "group": int(rows.groups[row]),
        "truncated": bool(rows.truncated[row]),
    }
    for name in ("advantages", "mu_logprobs", "pi_logprobs"):
        values = rows.tensors().get(name)
        sample[name] = None if values is None else values[row][mask].tolist()
    return sample


def _plain(value: object) -> object:
    """The same with numbers that JSON does not know as strings: "inf", "-inf", "nan"."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
