"""Token losses, to be minimised: functions of `LossInputs` that return `Losses`; `LOSSES` names them.

A recipe may name a loss of its own: `algorithm.loss: my_losses.py:my_loss`. It has the same signature:

    def my_loss(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from megatron_fp16rl.recipe import RecipeError
from megatron_fp16rl.utils.user_code import load_function

_MAX_LOG_RATIO = 60.0  # exp of it, summed over a batch, is still finite in fp32; its square is not
_MAX_WEIGHT = 1e4  # of a token of DPPO, as its authors ran it

# Names of the sums that we log ourselves.
_TAKEN = {"loss", "tokens", "sequence_tokens", "run_tokens", "policy", "kl", "corrected", "weight"}

# [batch, seq] loss of each token, and sums over response tokens to log as means, by name
Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class LossInputs:
    """All that a loss may read. Tensors are [batch, seq], log-probs in nats.

    logprobs       of the policy that learns, pi; the only tensor with a gradient
    old_logprobs   of the policy before the update: the learner's, or mu under `old_policy: rollout`
    mu_logprobs    of the policy that sampled, as the server computed them
    advantages     the same for all tokens of a response
    mask           bool, true at response tokens; losses outside count for nothing
    clip_low, clip_high, dual_clip, delta   as the recipe has them
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    mu_logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None


Loss = Callable[[LossInputs], Losses]


def ppo_clip(inputs: LossInputs) -> Losses:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), r = pi / pi_old of each token.

    dual_clip: c > 1; where A < 0 the loss is at most -A c. "clipped" counts the tokens without a gradient
    because of clipping. Sources: PPO, arXiv 1707.06347, equation 7; asymmetric range: DAPO,
    arXiv 2503.14476, section 3.1; dual clip: arXiv 1912.09729, equation 5.
    """
    ratio = torch.exp(_log_ratio(inputs.logprobs, inputs.old_logprobs, inputs.mask))
    return _clipped_loss(ratio, inputs, inputs.dual_clip)


def _clipped_loss(ratio: torch.Tensor, inputs: LossInputs, dual_clip: float | None) -> Losses:
    advantages, mask = inputs.advantages, inputs.mask
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    losses = torch.maximum(plain, clipped)
    was_clipped = clipped > plain
    if dual_clip is not None:
        cap = -advantages * dual_clip
        capped = (advantages < 0) & (losses > cap)
        losses, was_clipped = torch.where(capped, cap, losses), was_clipped | capped
    return _masked(losses, mask), {"clipped": (was_clipped & mask).sum()}


def gspo(inputs: LossInputs) -> Losses:
    """The clipped loss with one ratio a sequence: the geometric mean of its tokens' ratios.

    Each token has its sequence's loss, to be averaged over tokens and then over sequences. Source:
    GSPO, arXiv 2507.18071, equations 5 to 7.
    """
    mask = inputs.mask
    tokens = mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = _log_ratio(inputs.logprobs, inputs.old_logprobs, mask)
    mean = log_ratio.sum(1, keepdim=True) / tokens
    return _clipped_loss(mean.exp().expand_as(mask), inputs, None)


def cispo(inputs: LossInputs) -> Losses:
    """-A log pi times the clipped ratio, which has no gradient: no token loses its gradient.

    Source: MiniMax-M1, arXiv 2506.13585, equations 4 and 5.
    """
    mask = inputs.mask
    ratio = torch.exp(_log_ratio(inputs.logprobs, inputs.old_logprobs, mask)).detach()
    weight = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    losses = _masked(-inputs.advantages * weight * inputs.logprobs, mask)
    return losses, {"clipped": ((weight != ratio) & mask).sum()}


def policy_gradient(inputs: LossInputs) -> Losses:
    """-A log pi. Source: REINFORCE, Williams, Machine Learning 8 (1992)."""
    losses = _masked(-inputs.advantages * inputs.logprobs, inputs.mask)
    return losses, {"clipped": inputs.mask.sum() * 0}


def dppo_tv(inputs: LossInputs) -> Losses:
    """-A r of tokens whose probability has not moved too far from mu's in the direction of A, r = pi / mu.

    Too far: by more than delta, |pi - mu|, the total variation of (p, 1 - p). Source: DPPO, arXiv 2602.04879,
    equations 11 to 13; r is at most 10,000 as in its authors' runs (verl, examples/dppo_trainer).
    """
    pi, mu = inputs.logprobs.detach().exp(), inputs.mu_logprobs.exp()
    return _dppo(inputs, pi - mu, (pi - mu).abs())


def dppo_kl(inputs: LossInputs) -> Losses:
    """As `dppo_tv`; too far: KL[mu || pi] of (p, 1 - p) is more than delta. Source: there, equation 14."""
    pi, mu = inputs.logprobs.detach(), inputs.mu_logprobs
    others_pi, others_mu = ((-torch.expm1(p)).clamp(min=1e-8) for p in (pi, mu))
    divergence = mu.exp() * (mu - pi) + others_mu * (others_mu / others_pi).log()
    return _dppo(inputs, pi - mu, divergence)


def _dppo(inputs: LossInputs, shift: torch.Tensor, divergence: torch.Tensor) -> Losses:
    """shift: [batch, seq], its sign tells in which direction a token's probability has moved."""
    assert inputs.delta is not None
    mask = inputs.mask
    stopped = (inputs.advantages * shift > 0) & (divergence > inputs.delta)
    ratio = torch.exp(_log_ratio(inputs.logprobs, inputs.mu_logprobs, mask)).detach()
    # The gradient of log pi, weighed with r, is that of r.
    losses = -inputs.advantages * ratio.clamp(max=_MAX_WEIGHT) * inputs.logprobs
    return _masked(torch.where(stopped, 0.0, losses), mask), {"clipped": (stopped & mask).sum()}


def drpo(inputs: LossInputs) -> Losses:
    """-A r + |A| mu (r - 1)^2 / (2 delta), r = pi / mu of each token.

    In the gradient A r has the weight 1 - sign(A) (pi - mu) / delta: zero where DPPO's mask of the same delta
    begins, and negative beyond. Source: DRPO, arXiv 2606.09821, equation 8, as its authors' code has it
    (Tencent-Hunyuan/UniRL). "clipped" counts the tokens of negative weight.
    """
    assert inputs.delta is not None
    advantages, mask = inputs.advantages, inputs.mask
    ratio = torch.exp(_log_ratio(inputs.logprobs, inputs.mu_logprobs, mask))
    mu = _masked(inputs.mu_logprobs, mask).exp()
    moved = mu * (ratio - 1)  # pi - mu; first, for the square alone may be infinite
    losses = -advantages * ratio + advantages.abs() * moved * (ratio - 1) / (2 * inputs.delta)
    beyond = (advantages.sign() * mu * (ratio.detach() - 1)) > inputs.delta
    return _masked(losses, mask), {"clipped": (beyond & mask).sum()}


LOSSES: dict[str, Loss] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
    "policy_gradient": policy_gradient,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "drpo": drpo,
}


def find(name: str) -> Loss:
    """The loss of a recipe: one of LOSSES, or a user's own, FILE.py:FUNCTION. Raises RecipeError."""
    if name in LOSSES:
        return LOSSES[name]
    try:
        function = load_function(name, "inputs")
    except Exception as error:  # the user's file may raise anything when it is imported
        raise RecipeError(f"algorithm.loss={name}: {type(error).__name__}: {error}") from error

    def checked(inputs: LossInputs) -> Losses:
        returned = function(inputs)
        if not _are_losses(returned, inputs):
            raise RecipeError(
                f"algorithm.loss={name} must return the loss of each token, a [batch, seq] tensor that "
                "depends on inputs.logprobs, and a dictionary of sums to log, tensors without dimensions, "
                f"whose names are none of {', '.join(sorted(_TAKEN))}"
            )
        losses, sums = returned
        return _masked(losses, inputs.mask), sums

    return checked


def _are_losses(returned: Any, inputs: LossInputs) -> TypeGuard[Losses]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        return False
    losses, sums = returned
    return (
        isinstance(losses, torch.Tensor)
        and losses.shape == inputs.mask.shape
        and (losses.requires_grad or not inputs.logprobs.requires_grad)
        and isinstance(sums, dict)
        and all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in sums.values())
        and not sums.keys() & _TAKEN
    )


def negative_log_likelihood(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """-log p of each response token."""
    return _masked(-logprobs, mask)


def kl_penalty(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, mask: torch.Tensor, estimator: str
) -> torch.Tensor:
    """An estimate of KL[pi || reference] for each token sampled from pi.

    With d = log reference - log pi: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. Source: Schulman,
    "Approximating KL divergence" (2020). As a loss, only k2 has the gradient of the KL divergence.
    """
    d = _log_ratio(reference_logprobs, logprobs, mask)
    return {"k1": -d, "k2": d**2 / 2, "k3": torch.expm1(d) - d}[estimator]


def _log_ratio(logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log pi - log old, zero outside the mask, bounded so that no ratio becomes infinite."""
    return torch.where(mask, logprobs - old, 0.0).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _masked(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, losses, 0.0)
