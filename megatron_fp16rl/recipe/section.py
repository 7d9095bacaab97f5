"""Words that all sections of a recipe share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_fp16rl.errors import FinalError

Dtype = Literal["fp16", "bf16", "fp32"]
TORCH_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
Fraction = Annotated[float, Field(ge=0, le=1)]


class RecipeError(FinalError, ValueError):
    """A recipe that cannot be used. The message names file, key, value and remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def multiples(value: int, of: int) -> str:
    """For an error: the multiples next to a value that is none."""
    below = value // of * of
    return ", ".join(str(n) for n in (below, below + of) if n > 0)
