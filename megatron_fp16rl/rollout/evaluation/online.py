"""Suites that are asked in training, on the servers that training samples from."""

from dataclasses import dataclass

from megatron_fp16rl.data.tasks import Task, make
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.recipe import Suite as Settings
from megatron_fp16rl.rollout.client import Sampling
from megatron_fp16rl.rollout.evaluation import run, suites
from megatron_fp16rl.rollout.pool import Pool


@dataclass(frozen=True)
class Online:
    """One suite of a recipe, its problems read and its prompts made."""

    suite: suites.Suite
    task: Task
    prompts: list
    sampling: Sampling

    @classmethod
    def of(cls, settings: Settings, recipe: Recipe, tokenizer: object) -> "Online":
        """Raises RecipeError for a suite that cannot be had."""
        suite, rollout = suites.parse(settings.suite), recipe.rollout
        task = make(suites.task_of(suite, recipe), tokenizer, recipe.trainer.seed)
        sampling = Sampling(
            settings.max_new_tokens or rollout.max_new_tokens,
            settings.temperature,
            settings.top_p,
            tuple(rollout.stop),
        )
        return cls(
            suite,
            task,
            suites.prompts_of(suite, task, settings.problems),
            run.greedy(sampling) if suite.greedy else sampling,
        )

    def measure(self, pool: Pool, seed: int | None) -> dict[str, float]:
        """{"eval/NAME/METRIC": value}. seed: for servers that sample deterministically, else None."""
        rows, tally = run.respond(
            *([pool], self.task, self.prompts, self.suite.k, self.sampling, seed),
            at_once=len(self.prompts) * self.suite.k,  # the pool deals them to its servers
        )
        tally.check(self.task.max_error_fraction)
        key = f"eval/{self.suite.name}/{self.suite.label}"
        return {key: run.measure(self.suite, rows)["value"]}
