"""The mismatch of a step that no pass scored before its update."""

import torch

from tests.workers.common import answered, family_recipe, join_world, make_learner, my_share


def unscored(layout: dict) -> dict:
    """mismatch/* by the first update's own forward pass, and by a score pass of the same sequences."""
    world = join_world(**layout)
    from megatron_fp16rl.comparison import Comparison
    from megatron_fp16rl.metrics import mismatch
    from megatron_fp16rl.recipe.algorithm import Algorithm

    learner = {"optimizer": {"lr": 1e-3}, "micro_batch_tokens": 40}
    recipe = family_recipe("qwen3", layout, learner=learner, precision={"dtype": "fp32"})
    algorithm = Algorithm(loss="dppo_tv", old_policy="rollout", advantage="reinforce")
    recipe = recipe.model_copy(update={"algorithm": algorithm})
    learner = make_learner(recipe, world)
    comparison = Comparison(recipe, learner)
    noise = torch.randn(answered().tokens.shape, generator=torch.Generator().manual_seed(2))
    batch = answered()
    batch = batch.replace(mu_logprobs=(-2.6 + 0.3 * noise).clamp(max=0) * batch.mask)
    batch = my_share(batch.replace(rewards=noise[:, 0]), world)
    expected = mismatch.measure(learner.score(batch), world.data.group, mismatch.Clip(0.2, 0.2))
    prepared = learner.prepare(batch.scored(None))
    before = comparison.before_update(prepared, step=1)
    outcome = learner.update(prepared, 1)
    after = comparison.after_update(prepared, outcome, version=1)
    # A learner that gives other log-probs the second time; on a CPU this one does not.
    scored = learner.prepare(learner.score(batch))
    steady = comparison.before_update(scored, step=10)
    learner.score_in_other_company = lambda rows, _: rows.pi + 1e-2 * rows.mask
    noisy = comparison.before_update(scored, step=10)
    return {
        "scores": [comparison.scores(step) for step in (0, 1, 9, 10)],
        "before": before,
        "after": after,
        "noise": [metrics["mismatch/learner_noise"] for metrics in (steady, noisy)],
        "expected": expected,
        "since": mismatch.measure(learner.score(batch), world.data.group, mismatch.Clip(0.2, 0.2)),
    }


def interleaved_noise(counts: list[int]) -> list[float | None]:
    """mismatch/learner_noise of so many sequences, each a micro-batch of an interleaved pipeline."""
    layout = {"pipeline_parallel": 2, "model_chunks": 2}
    world = join_world(**layout)
    from megatron_fp16rl.comparison import noise

    recipe = family_recipe("qwen3-deep", layout, learner={"micro_batch_tokens": 10})
    learner = make_learner(recipe, world)
    batches = [answered().rows(range(count)) for count in counts]
    return [noise(learner, learner.score(batch), 1.0) for batch in batches]
