"""fp16rl bench: speed, and the sanity test."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_fp16rl.cli.common import (
    BAD_RECIPE,
    FAILED,
    AsJson,
    Overrides,
    console,
    fail,
)
from megatron_fp16rl.recipe import RecipeError

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


@app.command("learner")
def bench_learner(
    layers: Annotated[int, typer.Option(min=1)] = 4,
    hidden: Annotated[int, typer.Option(min=64, help="Hidden size, a multiple of 64.")] = 256,
    sequences: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 10,
    as_json: AsJson = False,
) -> None:
    """Time whole Megatron steps in FP16 against fp32, turn by turn, on one rank.

    Example: fp16rl bench learner --json
    """
    from megatron_fp16rl import bench

    result = bench.learner(layers, hidden, sequences, tokens, repeats)
    if as_json:
        print(json.dumps(result))
        return
    table = Table("dtype", "tokens/s", "s a step", "gradient norm", title=result["platform"])
    for row in result["rows"]:
        table.add_row(
            row["dtype"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['seconds']:.3f}",
            f"{row['grad_norm']:.5f}",
        )
    console.print(table)
    console.print(
        f"fp16 runs at {result['fp16_over_fp32']:.2f} of the speed of fp32; "
        f"gradient norms differ by {result['grad_norm_difference']:.1e}"
    )


@app.command("sanity")
def bench_sanity(
    only: Annotated[
        list[str] | None, typer.Option(help="An algorithm, e.g. gspo; several times. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/sanity"),
    as_json: AsJson = False,
) -> None:
    """The paper's sanity test on a tiny model: its six algorithms in FP16 and in BF16.

    A minute or two for each of the twelve runs. Called again, it goes on where it stopped.

    Examples:

        fp16rl bench sanity

        fp16rl bench sanity --only grpo --only gspo --seeds 2 --set trainer.steps=50
    """
    from megatron_fp16rl import sanity
    from megatron_fp16rl.report import sanity as page

    for name in only or []:
        if name not in sanity.ALGORITHMS:
            fail(f"--only {name}: there are {', '.join(sanity.ALGORITHMS)}", BAD_RECIPE)
    to = Console(stderr=True) if as_json else console
    try:
        rows = sanity.run(
            sanity.cells(only or [], seeds),
            out.resolve(),
            overrides or [],
            to,
            lambda line: to.print(line, style="dim"),
        )
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    except KeyboardInterrupt:
        fail(f"interrupted; call it again to go on; what is done is in {out}", FAILED)
    path = page.write_report(out.resolve(), rows)
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    console.print(page.table(rows))
    console.print(f"report: {path}")
