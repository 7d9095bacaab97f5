"""What is learnt: problems, and how responses are graded."""

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from megatron_fp16rl.recipe.section import AsMeant, Fraction, Seconds, Section


class AdditionTask(Section):
    """Sums of two numbers; the answer is written least significant digit first."""

    kind: Literal["addition"]
    digits: PositiveInt = 2
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    problems: str | None = Field(
        None, description="a file of sums, which are then all there is: trained on and evaluated on"
    )
    seed: int = 0


class Reward(Section):
    """How responses are graded; see rewards/."""

    max_error_fraction: Fraction = Field(
        0.1, description="of a step's graded responses; with more errors than this the run stops"
    )


class ExactReward(Reward):
    """1 for exactly the answer, white space around it apart."""

    kind: Literal["exact"]


class Workers(Reward):
    """Grading in processes that are killed when they hang."""

    workers: PositiveInt = Field(2, description="processes of each data-parallel rank")
    timeout_s: Seconds = Field(10, description="a response that takes longer earns 0")
    memory_gib: PositiveFloat | None = Field(4, description="address space of a worker")


class MathVerifyReward(Workers):
    """1 if math-verify finds the response's answer equal to the problem's."""

    kind: Literal["math_verify"]


class RegexReward(Workers):
    """1 if the last match of `pattern`, or its first group if it has one, is the answer."""

    kind: Literal["regex"]
    pattern: str

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern


class FunctionReward(Workers):
    """Your own: `def score(prompt: str, response: str, answer: str) -> float`."""

    kind: Literal["function"]
    path: str = Field(
        pattern=r"^.+\.py:\w+$", description="file:function, e.g. my_rewards.py:score"
    )
    memory_gib: PositiveFloat | None = Field(None, description="address space of a worker")


class HttpReward(Reward):
    """A service: POST of [{"prompt", "response", "answer"}, ...], answered with a list of numbers."""

    kind: Literal["http"]
    url: str = Field(pattern=r"^https?://")
    timeout_s: Seconds = Field(60, description="of one try, to the end of its answer")
    retries: Annotated[int, Field(ge=0)] = 4
    backoff_s: Seconds = Field(0.5, description="before the first retry; then doubled")
    token_variable: str | None = Field(
        None, description="environment variable with a bearer token, which no recipe should hold"
    )


Template = Literal["chat", "r1_distill", "qwen_math", "r1", "none"]


class Problems(Section):
    """Problems with answers: how they are put to the model, and which are kept from it."""

    template: Template = Field("chat", description="see tasks/templates.py")
    template_options: Annotated[dict[str, object], AsMeant] | None = Field(
        None,
        description="variables of the tokenizer's chat template, e.g. {enable_thinking: false}",
    )
    instruction: str = Field(description="follows the problem; in qwen_math the system prompt")
    max_prompt_tokens: PositiveInt | None = Field(
        None, description="problems with longer prompts are left out"
    )
    held_out: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share never trained on; none of them: there is no eval/accuracy",
        ),
    ] = 0.2
    seed: int = Field(0, description="of the split; the order is drawn with trainer.seed")

    @model_validator(mode="after")
    def _has_variables(self) -> "Problems":
        if self.template_options and self.template != "chat":
            raise ValueError(
                f"template_options={self.template_options} are of the tokenizer's chat template, not of "
                f"template={self.template}: set template: chat, or template_options: null"
            )
        return self


class DatasetTask(Problems):
    """Problems and answers from a file or a Hugging Face data set."""

    kind: Literal["dataset"]
    path: str | None = Field(None, description="a JSONL or Parquet file")
    name: str | None = Field(None, description="for datasets.load_dataset: owner/name, or a folder")
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    problem: str = Field(
        "problem", description="column; else its dots lead into nested ones: prompt.0.content"
    )
    answer: str = "answer"
    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    reward: Annotated[
        MathVerifyReward | ExactReward | RegexReward | FunctionReward | HttpReward,
        Field(discriminator="kind"),
    ] = MathVerifyReward(kind="math_verify")

    @model_validator(mode="after")
    def _one_source(self) -> "DatasetTask":
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


class ReasoningGymTask(Problems):
    """A generator of reasoning-gym, graded by its own verifier in [0, 1]."""

    kind: Literal["reasoning_gym"]
    name: str = Field(description="of the generator, e.g. leg_counting")
    options: Annotated[dict[str, object], AsMeant] = Field(
        default_factory=dict, description="its configuration"
    )
    size: PositiveInt = Field(1000, description="problems to generate")
    instruction: str = "Give your final answer between <answer> and </answer>."
    reward: Workers = Workers()
