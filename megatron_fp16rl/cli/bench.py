"""fp16rl bench: speed, and the sanity test."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, AsJson, Overrides, console, fail, say
from megatron_fp16rl.cli.measuring import (
    Asked,
    DryRun,
    Hidden,
    Layers,
    Nodes,
    Out,
    Ranks,
    RecipeFile,
    Repeats,
    Say,
    explained,
    numbers,
    one_of,
)
from megatron_fp16rl.recipe import TORCH_DTYPES, RecipeError
from megatron_fp16rl.tools.bench import tables
from megatron_fp16rl.utils.terminal import Console

app = typer.Typer(help="Measure speed, here or as a Slurm job.", no_args_is_help=True)


@app.command("collectives")
def bench_collectives(
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    ranks: Ranks = None,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    smallest: Annotated[int, typer.Option("--min-bytes", min=1)] = 1 << 10,
    largest: Annotated[int, typer.Option("--max-bytes", min=1)] = 16 << 20,
    factor: Annotated[int, typer.Option(min=2, help="From one size to the next.")] = 16,
    dtypes: Annotated[str, typer.Option(help="Any of fp16, bf16, fp32.")] = "fp16,bf16,fp32",
    groups: Annotated[
        str, typer.Option(help="Any of world, tensor, pipeline, expert, data.")
    ] = "world,tensor,pipeline,expert,data",
    operations: Annotated[str | None, typer.Option(help="E.g. all_reduce,all_to_all")] = None,
    repeats: Repeats = 10,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Latency and bandwidth between ranks: by operation, size, dtype and Megatron's groups.

    Every result is checked before it is timed. Bandwidths are those of NCCL-tests. Slow ranks and
    connections are named.

    Examples:

        fp16rl bench collectives --ranks 4 --set learner.tensor_parallel=2

        fp16rl bench collectives --nodes 4 --recipe recipes/mine.yaml

        srun --nodes=4 --ntasks-per-node=8 --mpi=pmi2 fp16rl bench collectives --json

        torchrun --nproc-per-node 8 --no-python fp16rl bench collectives --groups world
    """
    from megatron_fp16rl.tools.bench import collectives as bench

    sweep = bench.Sweep(
        bench.sizes(smallest, largest, factor),
        one_of(tuple(TORCH_DTYPES), dtypes, "--dtypes"),
        one_of(tuple(bench.GROUPS), groups, "--groups"),
        one_of(bench.OPERATIONS, operations or ",".join(bench.OPERATIONS), "--operations"),
        repeats,
    )
    asked = Asked("collectives", False, recipe, overrides, nodes, dry_run, out, as_json)
    with explained():
        resolved = asked.load(asked.ranks(ranks))
        if asked.submits(resolved, resolved.learner.ranks):
            return

    def measure(say: Say) -> dict:
        return bench.measure(resolved.learner, sweep, say)

    asked.measure(resolved.learner.ranks, measure, tables.collectives)


@app.command("sync")
def bench_sync(
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    layers: Layers = 8,
    hidden: Hidden = 1024,
    transports: Annotated[str, typer.Option(help="Any of distributed, disk.")] = "distributed,disk",
    buckets: Annotated[str, typer.Option(help="MiB, e.g. 16,1024")] = "16,64,256,1024",
    repeats: Repeats = 5,
    scratch: Annotated[
        Path | None, typer.Option(help="Where `disk` writes, in sight of the servers.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Seconds that a learner takes to publish its weights to SGLang servers.

    By transport and bucket size, and as a fraction of a bare broadcast of as many bytes, turn by turn
    in the same run.

    Examples:

        fp16rl bench sync

        fp16rl bench sync --recipe recipes/mine.yaml --set rollout.servers=2 --buckets 256,1024
    """
    from megatron_fp16rl.tools.bench import sync as bench

    ways = bench.Ways(
        one_of(bench.TRANSPORTS, transports, "--transports"),
        numbers(buckets, "--buckets"),
        repeats,
    )
    asked = Asked("sync", True, recipe, overrides, nodes, dry_run, out, as_json)
    with explained():
        resolved = asked.load(layers=layers, hidden=hidden)
        if asked.submits(resolved):
            return

    def measure(say: Say) -> dict | None:
        with tempfile.TemporaryDirectory(dir=scratch) as work:
            return bench.measure(resolved, ways, Path(work), say)

    asked.measure(resolved.learner.ranks, measure, tables.sync)


@app.command("rollout")
def bench_rollout(
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    layers: Layers = 4,
    hidden: Hidden = 256,
    concurrency: Annotated[str, typer.Option(help="Responses asked for at once.")] = "1,4,16,64",
    repeats: Repeats = 5,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Tokens a second that rollouts bring, graded and recorded, by how many are asked for at once.

    And as a fraction of what the same prompts bring when they are sent straight to the servers.

    Examples:

        fp16rl bench rollout

        fp16rl bench rollout --recipe recipes/mine.yaml --concurrency 64,256,1024
    """
    asked = Asked("rollout", True, recipe, overrides, nodes, dry_run, out, as_json)
    counts = numbers(concurrency, "--concurrency")
    with explained():
        resolved = asked.load(layers=layers, hidden=hidden)
        if asked.submits(resolved):
            return

    def measure(say: Say) -> dict:
        from megatron_fp16rl.tools.bench import rollout as bench

        with tempfile.TemporaryDirectory() as work:
            return bench.measure(resolved, counts, repeats, Path(work), say)

    asked.measure(1, measure, tables.rollout)


@app.command("learner")
def bench_learner(
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    ranks: Ranks = None,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    layers: Layers = 4,
    hidden: Hidden = 256,
    layouts: Annotated[
        list[str] | None,
        typer.Option(
            "--layout", help="E.g. tensor_parallel=2,sequence_parallel=true; several times."
        ),
    ] = None,
    dtypes: Annotated[str, typer.Option(help="Any of fp32, fp16, bf16.")] = "fp32,fp16",
    sequences: Annotated[int, typer.Option(min=1, help="Of a step, over all ranks.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    repeats: Repeats = 10,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time whole Megatron steps in FP16 against fp32, turn by turn, at one or several layouts.

    Examples:

        fp16rl bench learner --json

        fp16rl bench learner --ranks 2 --layout tensor_parallel=2 --layout pipeline_parallel=2

        fp16rl bench learner --nodes 2 --recipe recipes/mine.yaml --dtypes fp16,bf16
    """
    asked = Asked("learner", False, recipe, overrides, nodes, dry_run, out, as_json)
    from megatron_fp16rl.tools.bench import learner as bench

    names = one_of(tuple(TORCH_DTYPES), dtypes, "--dtypes")
    work = bench.Work(sequences, tokens, repeats, names)
    with explained():
        resolved = [
            asked.load(
                asked.ranks(ranks),
                tuple(f"learner.{pair}" for pair in text.split(",") if pair),
                layers=layers,
                hidden=hidden,
            )
            for text in layouts or [""]
        ]
        bench.check(resolved, work)
        count = resolved[0].learner.ranks
        if asked.submits(resolved[0], count):
            return

    def measure(say: Say) -> dict:
        return bench.measure(resolved, work, say)

    asked.measure(count, measure, _show_learner)


def _show_learner(result: dict) -> Table:
    table = tables.learner(result)
    if "fp16_over_fp32" in result:
        table.caption = (
            f"fp16 runs at {result['fp16_over_fp32']:.2f} of the speed of fp32; "
            f"gradient norms differ by {result['grad_norm_difference']:.1e}"
        )
    return table


@app.command("step")
def bench_step(
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    run: Annotated[
        Path | None, typer.Option(help="Of a run that there is already; nothing is started.")
    ] = None,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    steps: Annotated[int, typer.Option(min=1, help="Measured, after those to warm up.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps that are not counted.")] = 1,
    layers: Layers = 4,
    hidden: Hidden = 256,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Where the time of whole training steps goes: rollout, score, update, sync; and tokens a second.

    Examples:

        fp16rl bench step --recipe recipes/tiny/dense-grpo-fp16.yaml

        fp16rl bench step --run runs/tiny-dense-grpo-fp16
    """
    if run is not None and (recipe is not None or nodes is not None):
        fail("--run measures a run that there is: give it without --recipe and --nodes", BAD_RECIPE)
    # a warm start would take minutes, and is no part of a step
    cold = ["warm_start=null", *(overrides or [])]
    asked = Asked("step", True, recipe, cold, nodes, dry_run, out, as_json)
    from megatron_fp16rl.tools.bench import step as bench
    from megatron_fp16rl.tools.bench.facts import facts

    with explained():
        if run is None:
            from launch.run_folder import new_run_folder

            resolved = asked.load(layers=layers, hidden=hidden)
            if asked.submits(resolved):
                return
            run = new_run_folder(Path(resolved.trainer.run_root), resolved.name).resolve()
            with contextlib.redirect_stdout(sys.stderr):
                bench.run(bench.for_steps(resolved, warm_up + steps), run, say)
        asked.finish({**facts(), **bench.measure(run, warm_up)}, tables.step)


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
    from megatron_fp16rl.tools import sanity
    from megatron_fp16rl.tools.report import sanity as page

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
    path = page.write_curves(out.resolve(), rows)
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    console.print(page.table(rows))
    console.print(f"curves: {path}")
