"""Tasks: problems, and how responses are graded."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_fp16rl.recipe.values import (
    Float,
    Fraction,
    Int,
    Options,
    Place,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)


class AdditionTask(Section):
    """Sums of two numbers; the answer is written least significant digit first."""

    kind: Literal["addition"]
    digits: PositiveInt = 2
    held_out: Annotated[Float, Field(gt=0, lt=1)] = 0.1  # share never trained on
    problems: Place | None = None  # a file of sums, in place of all
    seed: Int = 0

    @model_validator(mode="after")
    def _can_be_listed(self) -> "AdditionTask":
        if self.problems is None and self.digits > 3:
            raise ValueError(
                f"digits={self.digits}: all sums are held in memory; take at most 3, or a file: problems"
            )
        return self


class Reward(Section):
    """How responses are graded; see data/rewards/."""

    max_error_fraction: Fraction = 0.1  # of graded responses; more stop the run


class ExactReward(Reward):
    """1 for exactly the answer, apart from surrounding white space."""

    kind: Literal["exact"]


class Workers(Reward):
    """Grading in worker processes, which are killed when they hang."""

    workers: PositiveInt = 2  # processes of each data-parallel rank
    timeout_s: Seconds = 10  # for one response; a timeout scores 0
    memory_gib: PositiveFloat | None = 4  # address space of a worker


class MathVerifyReward(Workers):
    """1 if math-verify finds the response's answer equal to the problem's."""

    kind: Literal["math_verify"]


class FunctionReward(Workers):
    """Your own: `def score(prompt: str, response: str, answer: str) -> float`."""

    kind: Literal["function"]
    path: Place = Field(pattern=r"^.+\.py:\w+$")  # file:function, e.g. my_rewards.py:score
    memory_gib: PositiveFloat | None = None


Template = Literal["chat", "r1_distill", "qwen_math", "r1", "none"]


class Problems(Section):
    """Problems with answers: how they are put to the model, and which are held out."""

    template: Template = "chat"  # environments: chat or none
    template_options: Options | None = None  # of the chat template: {enable_thinking: false}
    instruction: str  # follows the problem; in qwen_math the system prompt
    max_prompt_tokens: PositiveInt | None = None  # problems with longer prompts are left out
    # share never trained on; 0: no eval/accuracy
    held_out: Annotated[Float, Field(ge=0, lt=1)] = 0.2
    seed: Int = 0  # of the split; trainer.seed draws the order

    @model_validator(mode="after")
    def _template_takes_options(self) -> "Problems":
        if self.template_options and self.template != "chat":
            raise ValueError(
                f"template_options={self.template_options} are of the tokenizer's chat template, not of "
                f"template={self.template}: set template: chat, or template_options: null"
            )
        return self


class DatasetTask(Problems):
    """Problems and answers from a file or a Hugging Face data set."""

    kind: Literal["dataset"]
    path: Place | None = None  # a JSONL or Parquet file
    name: Place | None = None  # for datasets.load_dataset: owner/name, or a folder
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    problem: str = "problem"  # column; dots lead into nested ones: prompt.0.content
    answer: str = "answer"  # column
    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    reward: Annotated[
        MathVerifyReward | ExactReward | FunctionReward,
        Field(discriminator="kind"),
    ] = MathVerifyReward(kind="math_verify")

    @model_validator(mode="after")
    def _has_one_source(self) -> "DatasetTask":
        if (self.path is None) == (self.name is None):
            raise ValueError(
                f"path={self.path} and name={self.name}: give either path, a file, or name, a data set "
                "of the hub, and null for the other"
            )
        if self.path is not None and (self.config or self.revision):
            raise ValueError(
                f"config={self.config} and revision={self.revision} go with name, not with "
                f"path={self.path}: set them to null"
            )
        return self


class EnvironmentTask(Problems, Workers):
    """An environment of your own, over several turns: docs/environments.md."""

    kind: Literal["environment"]
    path: Place = Field(pattern=r"^.+\.py:\w+$")  # file:class, e.g. my_env.py:Env
    problems: Place  # a JSONL or Parquet file
    problem: str = "problem"  # column; what the model reads first
    answer: str = "answer"  # column; what the environment alone knows
    instruction: str = ""
    # of the model in a sample
    max_turns: PositiveInt = 8
    timeout_s: Seconds = 10  # for one turn; a timeout ends the sample, which earns 0
    memory_gib: PositiveFloat | None = None

    @model_validator(mode="after")
    def _text_has_a_place(self) -> "EnvironmentTask":
        if self.template not in ("chat", "none"):
            raise ValueError(
                f"template={self.template} is for one question: it has no place for what an environment "
                "says; set template: chat, or none for text as it is"
            )
        return self


Task = AdditionTask | DatasetTask | EnvironmentTask
