"""Types of the values in a recipe, and the base class of its sections."""

import os
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron_fp16rl.utils.errors import FinalError


class RecipeError(FinalError, ValueError):
    """A recipe that cannot be used. The message names file, key, value and remedy."""


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
Share = Annotated[Float, Field(gt=0, le=1)]
# Of a file or folder. No shell has expanded ~ in a recipe, nor in --set KEY=~/x.
Place = Annotated[str, AfterValidator(os.path.expanduser)]
NonEmpty = Annotated[str, Field(min_length=1)]
# Eleven days: some of Python's libraries fail with an OverflowError above 2^31 milliseconds.
Seconds = Annotated[Float, Field(gt=0, le=1_000_000)]

Dtype = Literal["fp16", "bf16", "fp32"]
Head = Literal["fp32"] | None  # of the output layer's products; None: as all others
TORCH_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
HIDDEN = "(not shown)"  # replaces values of slurm.environment in what is sent around
Options = dict[str, Any]  # passed on to Megatron, SGLang or transformers: no type of ours


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
