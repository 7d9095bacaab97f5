"""Problems that are played over several turns, in an environment."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_fp16rl.data.batch import Prompt
from megatron_fp16rl.data.environments import Environments
from megatron_fp16rl.data.rewards import ExactGrader, Grade
from megatron_fp16rl.data.tasks.problems import ProblemTask
from megatron_fp16rl.recipe import EnvironmentTask

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase


class EnvironmentProblems(ProblemTask):
    """Problems whose samples an environment plays and grades."""

    environment: Environments

    def __init__(
        self,
        settings: EnvironmentTask,
        problems: list[tuple[str, str]],
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
    ) -> None:
        most = settings.max_error_fraction
        super().__init__(settings, problems, ExactGrader(), most, tokenizer, seed)
        self.environment = Environments(settings)

    def grades(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Grade]:
        """Raises RuntimeError: an environment grades what it has played, and no text."""
        raise RuntimeError("a sample of an environment cannot be graded by its text")
