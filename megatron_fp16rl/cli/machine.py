"""fp16rl doctor, mismatch: what this machine has, what its engines do."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.table import Table

from megatron_fp16rl.cli.common import (
    BAD_RECIPE,
    FAILED,
    AsJson,
    Overrides,
    console,
    fail,
    load_recipe,
    names,
    say,
)
from megatron_fp16rl.recipe import Dtype, Head, Model

app = typer.Typer()
Template = Literal["chat", "none"]


@app.command()
def doctor(
    warm: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE",
            help="Also start one of its servers once: kernels are compiled before many wait for them.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, what it lacks, and what that means. Exit code 1: nothing can run.

    Example: srun --gpus=1 fp16rl doctor --warm recipes/mine.yaml
    """
    from megatron_fp16rl.tools.doctor import examine

    if overrides and warm is None:
        fail("--set goes with --warm RECIPE", BAD_RECIPE)
    recipe = load_recipe(warm, overrides or []) if warm else None
    findings = examine()
    ready = not any(finding.needed for finding in findings)
    result: dict[str, Any] = {"ready": ready, "findings": [vars(f) for f in findings]}
    if not as_json:
        table = Table("", "found", "which means")
        for finding in findings:
            style = "red" if finding.needed else None
            table.add_row(finding.name, finding.found or "-", finding.meaning, style=style)
        console.print(table)
        console.print("ready" if ready else "not ready: see the red lines")
    if recipe is not None and ready:
        from megatron_fp16rl.tools.warm import warm as start_one

        result["warm"] = start_one(recipe)
        if not as_json:
            console.print(
                "a server was up after {start_s:.0f} s and answered in {answer_s:.1f} s; its compiled "
                "kernels are in {kernels}".format_map(result["warm"])
            )
    if as_json:
        print(json.dumps(result))
    raise typer.Exit(0 if ready else FAILED)


@app.command("mismatch")
def mismatch_study(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, e.g. models/smollm2")],
    dtypes: Annotated[str, typer.Option(help="Any of fp16, bf16, fp32.")] = "fp16,bf16,fp32",
    prompts: Annotated[
        Path, typer.Option(help='A JSONL of {"problem": ...}, gone through as often as it takes.')
    ] = Path("recipes/tiny/data/math.jsonl"),
    samples: Annotated[int, typer.Option(min=1, help="Sequences of each dtype.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 256,
    template: Annotated[
        Template, typer.Option(help="chat: the tokenizer's; none: the bare problem.")
    ] = "chat",
    compared: Annotated[int, typer.Option(min=0, help="Sequences to compare layer by layer.")] = 4,
    deterministic: Annotated[
        bool,
        typer.Option(
            help="A seed for each sequence. It changes a GPU's kernels; not all models can."
        ),
    ] = True,
    head: Annotated[
        Head, typer.Option(help="fp32: logits of both engines, as precision.head.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="Of the study's folder; default: the model's.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Where studies are kept.")] = Path("studies"),
    as_json: AsJson = False,
) -> None:
    """Measure how far SGLang and Megatron are apart on the same weights in each dtype, and where.

    A server samples, the learner scores. All is kept in studies/NAME/, with figures; the same
    command again resumes there.

    Example: fp16rl mismatch models/smollm2 --dtypes fp16,bf16 --samples 64 --max-tokens 256
    """
    from megatron_fp16rl.learner.nonfinite import NonFinite
    from megatron_fp16rl.models.build import model_folder
    from megatron_fp16rl.tools.study import figures
    from megatron_fp16rl.tools.study.run import Study, run

    folder = root / (name or model.resolve().name)
    study = Study(
        model_folder(Model(path=str(model))),
        tuple(names(get_args(Dtype), dtypes, "--dtypes")),
        *(prompts, samples, max_tokens, template, compared),
        deterministic=deterministic,
        seed=seed,
        head=head,
    )
    try:
        result = run(study, folder, say)
    except NonFinite as error:
        error.save(folder)
        raise
    picture = figures.write_figures(folder, result)
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    console.print(figures.table(result))
    console.print(f"figures: {picture}")
