"""Words that all sections of a recipe share."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from megatron_fp16rl.utils.errors import FinalError

Dtype = Literal["fp16", "bf16", "fp32"]
TORCH_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
Fraction = Annotated[float, Field(ge=0, le=1)]
# Eleven days: above 2^31 milliseconds a wait is an OverflowError in some of Python's libraries.
Seconds = Annotated[float, Field(gt=0, le=1_000_000)]


HIDDEN = "(not shown)"  # a value of slurm.environment, in what is there to be read by others


class RecipeError(FinalError, ValueError):
    """A recipe that cannot be used. The message names file, key, value and remedy."""


class SpelledInt(int):
    """A number that is written in another way than Python's, for keys that want text: 0x1F."""

    def __new__(cls, value: int, text: str) -> "SpelledInt":
        made = super().__new__(cls, value)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text


class SpelledFloat(float):
    """The same with a fraction: as text 1.10 is not 1.1."""

    def __new__(cls, value: float, text: str) -> "SpelledFloat":
        made = super().__new__(cls, value)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text


class Ambiguous(str):
    """Text that some readers of YAML take for a flag or a number: yes, 012, 1_000."""


def _as_meant(value: Any) -> Any:
    """Options as Python's own values. Raises ValueError for what is read in one way here, in another there."""
    if isinstance(value, dict):
        return {key: _as_meant(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_meant(inner) for inner in value]
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


# For dictionaries of options that are passed on: the key alone does not tell what is meant by a value.
AsMeant = BeforeValidator(_as_meant)


class Section(BaseModel):
    """A part of a recipe. Text keys take numbers as they are written."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


def multiples(value: int, of: int) -> str:
    """For an error: the multiples next to a value that is none."""
    below = value // of * of
    return ", ".join(str(n) for n in (below, below + of) if n > 0)
