"""Row scaling: what fp16 and its loss scale do to an update, what an overflow and a checkpoint leave."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.tools.selftest import models
from megatron_fp16rl.tools.selftest.result import Check, Setting, at_most, equal

if TYPE_CHECKING:  # importing it imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

_ROUNDING = 1e-3
_DIRECTION = 1e-5  # 1 - cosine; of vectors 1e-3 apart it is 5e-7
_OVERFLOWS = 2.0**60
_AGAIN = 1e-2  # 0 where sums have one order; Adam's count of updates alone, if lost, makes it 0.5


def scaling(setting: Setting) -> list[Check]:
    """A first update in fp32 and in fp16; then one that overflows, one more; one before and after a checkpoint."""
    world, checks = models.world(), []
    for name, config in models.TINY.items():
        folder = setting.folder / name
        models.hf_model(config, folder)
        exact, half = (models.learner(folder, world, dtype) for dtype in ("fp32", "fp16"))
        batch = half.share(Batch.from_token_ids(models.random_tokens()))
        (exact_outcome, exact_loss), (outcome, loss) = (
            each.supervised_update(batch) for each in (exact, half)
        )
        norm = outcome.grad_norm or 0.0
        off = {
            "loss": (abs(loss / exact_loss - 1), _ROUNDING),
            "gradient norm": (abs(norm / (exact_outcome.grad_norm or 1) - 1), _ROUNDING),
            "gradient direction": (1 - _cosine(_gradient(exact), _gradient(half)), _DIRECTION),
        }
        checks += [at_most(f"{name}: {what}", *value) for what, value in off.items()]
        checks += [
            check.model_copy(update={"name": f"{name}: {check.name}"})
            for check in [*_overflow(half, batch), *_resume(half, batch, folder / "checkpoints")]
        ]
    return checks


def _overflow(learner: "Learner", batch: Batch) -> list[Check]:
    scaler = learner.scaler
    assert scaler is not None
    before, usual = _state(learner), scaler.scale.item()
    scaler.scale.fill_(_OVERFLOWS)
    outcome, _ = learner.supervised_update(batch)
    changed = _changed(before, _state(learner))
    halved, skipped = scaler.scale.item() / _OVERFLOWS, scaler.skipped_total
    scaler.scale.fill_(usual)
    next_outcome, _ = learner.supervised_update(batch)
    return [
        equal("update that overflows", _done(outcome.stepped), "skipped"),
        equal("skipped updates counted", skipped, 1),
        equal("weights and moments that it changed", changed, 0),
        equal("loss scale after it, over before", halved, 0.5),
        equal("update after it", _done(next_outcome.stepped), "made"),
        equal("weights moved then", str(_changed(before, _state(learner)) > 0), "True"),
    ]


def _resume(learner: "Learner", batch: Batch, folder: Path) -> list[Check]:
    """An update, back to the checkpoint before it, the update again."""
    from megatron_fp16rl.learner import checkpoint

    saved = checkpoint.save(learner, folder, checkpoint.Progress(1, 1), learner.hf_dir)
    before = _state(learner)
    learner.supervised_update(batch)
    after = _state(learner)
    checkpoint.load(learner, saved)
    lost = _changed(before, _state(learner))
    learner.supervised_update(batch)
    off, moved = (_distance(after, other) for other in (_state(learner), before))
    return [
        equal("weights and moments that a checkpoint changed", lost, 0),
        at_most("update after it, over that before", off / moved, _AGAIN),
    ]


def _done(stepped: bool) -> str:
    return "made" if stepped else "skipped"


def _gradient(learner: "Learner") -> torch.Tensor:
    """All gradients of the last update, in one vector."""
    return torch.cat([shard.main_grad.flatten().double() for shard in learner.model.trained])


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one @ other / (one.norm() * other.norm())).item()


def _state(learner: "Learner") -> list[torch.Tensor]:
    """Copies of all weights, and of what the optimizer keeps of them."""
    tensors = []
    for shard in learner.model.trained:
        kept = learner.optimizer.state_of(shard.parameter).tensors
        tensors += [shard.parameter.detach().clone(), *(t.clone() for t in kept.values())]
    return tensors


def _changed(before: list[torch.Tensor], after: list[torch.Tensor]) -> int:
    """How many tensors are not the same to the last bit."""
    return sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    squares = [(a.double() - b.double()).pow(2).sum() for a, b in zip(one, other, strict=True)]
    return torch.stack(squares).sum().sqrt().item()
