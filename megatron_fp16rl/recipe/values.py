"""Types of the values in a recipe, and the base class of its sections."""

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megatron_fp16rl.utils.errors import FinalError


class RecipeError(FinalError, ValueError):
    """A recipe that cannot be used. The message names file, key, value and remedy."""


class Section(BaseModel):
    """A part of a recipe. Text keys take numbers as they are written."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


def _refuse_flag(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take 1 for true
        raise ValueError("a number is wanted, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_refuse_flag)]
Float = Annotated[float, BeforeValidator(_refuse_flag)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
# Eleven days: some of Python's libraries fail with an OverflowError above 2^31 milliseconds.
Seconds = Annotated[Float, Field(gt=0, le=1_000_000)]

Dtype = Literal["fp16", "bf16", "fp32"]
TORCH_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
HIDDEN = "(not shown)"  # replaces values of slurm.environment in what is sent around


class Spelled:
    """A number whose text differs from Python's. Text keys get that text: 1.10, 0x1F."""

    text: str

    def spelled(self, text: str) -> Self:
        self.text = text
        return self

    def __str__(self) -> str:
        return self.text


class SpelledInt(Spelled, int):
    pass


class SpelledFloat(Spelled, float):
    pass


class Ambiguous(str):
    """Text that YAML 1.1 reads as a flag or a number: yes, 012, 1_000."""


def _as_python(value: Any) -> Any:
    """Plain Python values of options. Raises ValueError where YAML 1.1 and 1.2 disagree."""
    if isinstance(value, dict):
        return {key: _as_python(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_python(inner) for inner in value]
    if isinstance(value, Ambiguous):
        raise ValueError(
            f"{value} is a flag or a number for some readers of YAML, and text for others: write true or "
            f"false, plain digits, or '{value}' in quotes"
        )
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value}: a finite number is wanted")
        return float(value)
    return int(value) if isinstance(value, SpelledInt) else value


# Options that are passed on to Megatron, SGLang or transformers: their keys tell us no type.
AS_PYTHON = BeforeValidator(_as_python)
Options = Annotated[dict[str, Any], AS_PYTHON]


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation admits: one, none, or the kinds of a union such as Task."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def kind_of(section: type[Section]) -> str | None:
    """The `kind:` by which a recipe names one section of a union."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation)[0] if field else None


def multiples(value: int, of: int) -> str:
    """The multiples of `of` next to `value`, for a message."""
    below = value // of * of
    return ", ".join(str(n) for n in (below, below + of) if n > 0)
