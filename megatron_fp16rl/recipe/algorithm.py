"""Advantage, loss, corrections, KL penalty; see algorithms/."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megatron_fp16rl.recipe.values import Float, Place, PositiveFloat, PositiveInt, Section


class Correction(Section):
    """Importance weights for samples of mu: docs/algorithms.md."""

    ratio: Literal["token", "sequence", "geometric", "k3", "k3_max"]
    action: Literal["truncate", "mask", "reject"]
    low: PositiveFloat | None = None
    high: PositiveFloat | None = None

    @model_validator(mode="after")
    def _has_its_bounds(self) -> "Correction":
        if self.ratio in ("k3", "k3_max") and self.action != "reject":
            raise ValueError(
                f"ratio={self.ratio} is no ratio to weigh with: use it with action: reject"
            )
        if self.action == "reject" and self.low is None and self.high is None:
            raise ValueError("action=reject needs a bound: give low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self


class KL(Section):
    """A penalty for leaving another policy."""

    coefficient: PositiveFloat
    anchor: Literal["start", "rollout"] = "start"  # the run's first weights, or those that sampled
    into: Literal["loss", "reward"] = "loss"
    # null: k2 in the loss, as its gradient is the divergence's; k1 in the reward, where it has no bias
    estimator: Literal["k1", "k2", "k3"] | None = None

    @model_validator(mode="after")
    def _can_be_learnt(self) -> "KL":
        if self.estimator == "k1" and self.into == "loss":
            raise ValueError(
                "estimator=k1: in the loss its expected gradient is zero, whatever the policy; use k2, or into: "
                "reward"
            )
        if self.anchor == "rollout" and self.into == "reward":
            raise ValueError(
                "anchor=rollout: in the reward this would be the mismatch before the step, which the learner "
                "cannot change; use into: loss"
            )
        return self

    @property
    def estimate(self) -> Literal["k1", "k2", "k3"]:
        """The estimator that is meant."""
        return self.estimator or ("k2" if self.into == "loss" else "k1")


class Overlong(Section):
    """DAPO's soft punishment (arXiv 2503.14476, 3.4): the reward falls over the last `buffer` tokens."""

    buffer: PositiveInt
    penalty: PositiveFloat = 1.0  # at the limit; DAPO's is 0.5 where rewards are 0 and 1


LOSSES = ("ppo_clip", "gspo", "cispo", "policy_gradient", "dppo_tv", "dppo_kl", "drpo")
# Losses bounded by the shift of a token's probability from mu, and the bounds that their authors published.
DELTAS = {"dppo_tv": 0.15, "dppo_kl": 0.05, "drpo": 12.5}


class Algorithm(Section):
    advantage: Literal[
        "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline"
    ] = "grpo"
    # ppo_clip, gspo, cispo, policy_gradient, dppo_tv, dppo_kl, drpo, or your own, e.g. my_losses.py:my_loss
    loss: Place = "ppo_clip"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    # of dppo_tv, dppo_kl, drpo; null: their authors' 0.15, 0.05, 12.5
    delta: PositiveFloat | None = None
    dual_clip: Annotated[Float, Field(gt=1)] | None = None
    # max_length: sum / (sequences x rollout.max_new_tokens)
    aggregation: Literal["token_mean", "sequence_mean", "max_length"] = "token_mean"
    old_policy: Literal["learner", "rollout"] = "learner"  # whose log-probs are the old ones
    correction: Correction | None = None
    kl: KL | None = None
    overlong: Overlong | None = None

    @property
    def keeps_reference(self) -> bool:
        """Whether a KL penalty needs the run's first weights."""
        return self.kl is not None and self.kl.anchor == "start"

    @property
    def needs_scores(self) -> bool:
        """Whether advantages or the loss need the learner's log-probs before the update, or a reference's."""
        return self.old_policy == "learner" or bool(self.correction) or self.keeps_reference

    @property
    def bound(self) -> float | None:
        """`delta`, or what the authors of the loss published; None for losses without one."""
        return self.delta or DELTAS.get(self.loss)

    @field_validator("loss")
    @classmethod
    def _is_known(cls, loss: str) -> str:
        if loss not in LOSSES and not re.fullmatch(r".+\.py:\w+", loss):
            raise ValueError(
                f"there is no loss {loss!r}: take one of {', '.join(LOSSES)}, or your own as "
                "FILE.py:FUNCTION"
            )
        return loss

    @model_validator(mode="after")
    def _parts_go_together(self) -> "Algorithm":
        if self.dual_clip is not None and self.loss in LOSSES[1:]:
            raise ValueError(f"dual_clip goes with loss=ppo_clip, not with {self.loss}")
        if self.loss == "policy_gradient" and self.old_policy == "rollout":
            raise ValueError("loss=policy_gradient has no old policy: remove old_policy")
        if self.loss in DELTAS and self.old_policy != "rollout":
            raise ValueError(
                f"loss={self.loss} is anchored at the policy that sampled: set old_policy: rollout"
            )
        if self.delta is not None and self.loss in LOSSES and self.loss not in DELTAS:
            raise ValueError(f"delta goes with loss={', '.join(DELTAS)}, not with {self.loss}")
        if self.loss == "dppo_tv" and self.delta is not None and self.delta >= 1:
            raise ValueError(
                f"loss=dppo_tv: delta={self.delta:g} bounds how far a probability shifts, which is below 1; "
                f"its authors' is {DELTAS['dppo_tv']}"
            )
        if self.old_policy == "rollout" and self.correction and self.correction.action != "reject":
            raise ValueError(
                "old_policy=rollout has the ratio to mu in the loss already; a correction that "
                "weighs with it again would count it twice: use action: reject, or remove one"
            )
        return self
