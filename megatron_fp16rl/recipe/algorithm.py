"""What samples are worth, and the loss that is made of them."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_fp16rl.recipe.section import Section


class Correction(Section):
    """Weights for samples of mu that pi learns from; see algorithms/corrections.py."""

    ratio: Literal["token", "sequence", "geometric", "k3"]
    action: Literal["truncate", "mask", "reject"]
    low: PositiveFloat | None = None
    high: PositiveFloat | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> "Correction":
        if self.ratio == "k3" and self.action != "reject":
            raise ValueError("ratio=k3 is no ratio to weigh with: use it with action: reject")
        if self.action == "reject" and self.low is None and self.high is None:
            raise ValueError("action=reject needs a bound: give low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self


class KL(Section):
    """A penalty for leaving the reference policy, which is that of the run's first weights."""

    coefficient: PositiveFloat
    estimator: Literal["k1", "k2", "k3"] = "k3"
    into: Literal["loss", "reward"] = "loss"


class Overlong(Section):
    """DAPO's soft punishment: the reward falls over the last `buffer` tokens before the limit.

    DAPO's penalty of 1 is of rewards of -1 and 1 (arXiv 2503.14476, section 3.4). Where a right answer
    earns 1 and a wrong one 0, as most rewards here have it, 0.5 is the same share of what they are apart.
    """

    buffer: PositiveInt
    penalty: PositiveFloat = Field(
        1.0, description="at the limit; DAPO's is 0.5 where rewards are 0 and 1"
    )


class Algorithm(Section):
    advantage: Literal[
        "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline"
    ] = "grpo"
    loss: Literal["ppo_clip", "gspo", "cispo", "policy_gradient"] = "ppo_clip"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    aggregation: Literal["token_mean", "sequence_mean", "max_length"] = Field(
        "token_mean", description="max_length: summed, over sequences x rollout.max_new_tokens"
    )
    old_policy: Literal["learner", "rollout"] = Field(
        "learner", description="whose log-probs the loss takes for those before the update"
    )
    correction: Correction | None = None
    kl: KL | None = None
    overlong: Overlong | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "Algorithm":
        if self.dual_clip is not None and self.loss != "ppo_clip":
            raise ValueError(f"dual_clip goes with loss=ppo_clip, not with {self.loss}")
        if self.loss == "policy_gradient" and self.old_policy == "rollout":
            raise ValueError("loss=policy_gradient has no old policy: remove old_policy")
        if self.old_policy == "rollout" and self.correction and self.correction.action != "reject":
            raise ValueError(
                "old_policy=rollout has the ratio to mu in the loss already; a correction that "
                "weighs with it again would count it twice: use action: reject, or remove one"
            )
        return self
