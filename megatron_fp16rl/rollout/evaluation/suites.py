"""What is asked: suites such as `aime.jsonl:avg@32`, and the tasks behind them."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_fp16rl.data.tasks.dataset import columns
from megatron_fp16rl.recipe import DatasetTask, Recipe, RecipeError

HELD_OUT, TRAINING = "held-out", "training"
_COLUMNS = ("problem", "answer")  # of a suite's file, unless it has those of the recipe's own data
_METRIC = re.compile(r"(avg|pass|maj)@([1-9]\d*)|greedy")


@dataclass(frozen=True)
class Suite:
    """Problems and a metric over tries at them.

    source    a JSONL or Parquet file, "held-out" or "training" for those of a run's recipe
    metric    "avg", "pass", "maj" or "greedy"
    k         tries that the metric is about; 1 for greedy
    """

    source: str
    metric: str
    k: int

    @property
    def greedy(self) -> bool:
        return self.metric == "greedy"

    @property
    def label(self) -> str:
        """The metric as it was asked for."""
        return self.metric if self.greedy else f"{self.metric}@{self.k}"

    @property
    def name(self) -> str:
        """The source, without folders and endings."""
        return self.source if self.source in (HELD_OUT, TRAINING) else Path(self.source).stem


def parse(text: str) -> Suite:
    """ "aime.jsonl:avg@32" and the like. Raises RecipeError."""
    source, _, metric = text.rpartition(":")
    found = _METRIC.fullmatch(metric)
    if not source or found is None:
        raise RecipeError(
            f"--suite {text}: write FILE:METRIC with METRIC one of avg@K, pass@K, maj@K or greedy, "
            f"e.g. aime.jsonl:avg@32; for FILE also {HELD_OUT} or {TRAINING}"
        )
    if metric == "greedy":
        return Suite(source, "greedy", 1)
    return Suite(source, found[1], int(found[2]))


def task_of(suite: Suite, recipe: Recipe | None) -> object:
    """The settings of a suite's task: the recipe's, of which a file replaces the data.

    A file has the recipe's columns, or `problem` and `answer`. Raises RecipeError where it has neither, and
    where a suite needs a recipe and there is none.
    """
    if suite.source in (HELD_OUT, TRAINING):
        if recipe is None:
            raise RecipeError(f"--suite {suite.source} needs a RUN, or --recipe for its task")
        return recipe.task
    if recipe is None:
        return DatasetTask(kind="dataset", path=suite.source, held_out=0.0)
    if not isinstance(recipe.task, DatasetTask):
        raise RecipeError(
            f"--suite {suite.source}: the recipe's task is {recipe.task.kind}, which reads no files; "
            f"ask for {HELD_OUT} or {TRAINING}"
        )
    choices = [(recipe.task.problem, recipe.task.answer), _COLUMNS]
    problem, answer = columns(Path(suite.source), list(dict.fromkeys(choices)), "suite")
    changes = {"path": suite.source, "name": None, "config": None, "revision": None}
    changes |= {"problem": problem, "answer": answer, "held_out": 0.0}
    return recipe.task.model_copy(update=changes)


def prompts_of(suite: Suite, task: object, count: int | None) -> list[object]:
    """The prompts of a suite, the same at every call, at most `count`. Raises RecipeError without any."""
    most = 10**9 if count is None else count
    if suite.source != HELD_OUT:
        return task.all_training_prompts(most)
    if prompts := task.held_out_prompts(most):
        return prompts
    raise RecipeError(f"--suite {suite.source}: the recipe's task holds no problems out")
