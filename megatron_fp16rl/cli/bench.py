"""fp16rl bench: speed, and the sanity test."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import typer
from rich.box import SIMPLE_HEAD

from megatron_fp16rl.checks import check_model
from megatron_fp16rl.cli.as_job import DryRun, Nodes, cell, in_job, show_job
from megatron_fp16rl.cli.common import (
    BAD_RECIPE,
    FAILED,
    AsJson,
    Overrides,
    console,
    explained,
    fail,
    names,
    say,
    table,
)
from megatron_fp16rl.recipe import Dtype, Recipe
from megatron_fp16rl.tools.bench import job
from megatron_fp16rl.tools.bench.common import Result, Say, facts, load_recipe
from megatron_fp16rl.tools.bench.ranks import joined, launched
from megatron_fp16rl.utils.terminal import Console

app = typer.Typer(help="Measure speed, here or as a Slurm job.", no_args_is_help=True)

RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="Default: a small random model that answers sums.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Of each measurement, after one to warm up.")]


class _How(NamedTuple):
    """Options of all commands that measure."""

    recipe: Path | None
    overrides: list[str] | None
    nodes: int | None
    dry_run: bool
    as_json: bool


@app.command("collectives")
def bench_collectives(
    recipe: RecipeFile = None,
    largest: Annotated[int, typer.Option("--max-bytes", min=1024)] = 16 << 20,
    repeats: Repeats = 10,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Latency and bus bandwidth of all-reduce, all-gather and broadcast over the learner's groups.

    In the recipe's dtype. Bandwidths are those of NCCL-tests.

    Examples:

        torchrun --nproc-per-node 8 --no-python fp16rl bench collectives

        fp16rl bench collectives --recipe recipes/mine.yaml --nodes 4 --dry-run
    """
    from megatron_fp16rl.tools.bench import collectives as bench

    sizes = [1024 * 16**i for i in range(12) if 1024 * 16**i <= largest]
    _measure(
        "collectives",
        lambda settings, say: bench.measure(settings, sizes, repeats, say),
        _How(recipe, overrides, nodes, dry_run, as_json),
    )


@app.command("sync")
def bench_sync(
    recipe: RecipeFile = None,
    buckets: Annotated[str, typer.Option(help="MiB, e.g. 16,1024")] = "16,64,256,1024",
    repeats: Repeats = 5,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Seconds that a learner takes to publish its weights to SGLang servers.

    By transport and bucket size, and as a fraction of a bare broadcast of as many bytes, turn by turn
    in the same run.

    Example: fp16rl bench sync --recipe recipes/mine.yaml --set rollout.servers=2 --buckets 256,1024
    """
    from megatron_fp16rl.tools.bench import sync as bench

    sizes = _numbers(buckets, "--buckets")
    _measure(
        "sync",
        lambda settings, say: bench.measure(settings, sizes, repeats, say),
        _How(recipe, overrides, nodes, dry_run, as_json),
    )


@app.command("rollout")
def bench_rollout(
    recipe: RecipeFile = None,
    concurrency: Annotated[str, typer.Option(help="Responses in flight.")] = "1,4,16,64",
    repeats: Repeats = 5,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tokens a second that rollouts collect, graded and recorded, by the responses in flight.

    And as a fraction of what the same prompts bring when they are sent straight to the servers.

    Example: fp16rl bench rollout --recipe recipes/mine.yaml --concurrency 64,256,1024
    """
    from megatron_fp16rl.tools.bench import rollout as bench

    counts = _numbers(concurrency, "--concurrency")
    _measure(
        "rollout",
        lambda settings, say: bench.measure(settings, counts, repeats, say),
        _How(recipe, overrides, nodes, dry_run, as_json),
    )


@app.command("learner")
def bench_learner(
    recipe: RecipeFile = None,
    dtypes: Annotated[str, typer.Option(help="Any of fp32, fp16, bf16.")] = "fp32,fp16",
    sequences: Annotated[int, typer.Option(min=1, help="Of a step, over all ranks.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    variants: Annotated[
        str, typer.Option(help="Of packed, rows, bare (Megatron's own step): instead of dtypes.")
    ] = "",
    varied: Annotated[
        bool, typer.Option("--varied", help="With --variants: lengths with --tokens as their mean.")
    ] = False,
    repeats: Repeats = 10,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Time whole Megatron steps in FP16 against fp32, or variants of them in the recipe's dtype, turn by turn.

    Examples:

        fp16rl bench learner

        fp16rl bench learner --variants packed,rows --varied --tokens 48 --sequences 64

        fp16rl bench learner --variants packed,bare

        torchrun --nproc-per-node 2 --no-python fp16rl bench learner --set learner.tensor_parallel=2
    """
    from megatron_fp16rl.tools.bench import learner as bench

    chosen = names(get_args(Dtype), dtypes, "--dtypes")
    of = names(bench.VARIANTS, variants, "--variants") if variants else []

    def measure(settings: Recipe, say: Say) -> Result:
        if of:
            return bench.compare(settings, of, sequences, tokens, varied, repeats)
        return bench.measure(settings, chosen, sequences, tokens, repeats)

    _measure("learner", measure, _How(recipe, overrides, nodes, dry_run, as_json), sequences)


@app.command("checkpoint")
def bench_checkpoint(
    recipe: RecipeFile = None,
    sequences: Annotated[int, typer.Option(min=1, help="Of a step, over all ranks.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    repeats: Repeats = 5,
    nodes: Nodes = None,
    dry_run: DryRun = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Steps that save a checkpoint, with `checkpoint.background` and without, against steps that do not.

    Example: fp16rl bench checkpoint --recipe recipes/mine.yaml --set trainer.run_root=/lustre/me/runs
    """
    from megatron_fp16rl.tools.bench import checkpoint as bench

    _measure(
        "checkpoint",
        lambda settings, say: bench.measure(settings, sequences, tokens, repeats),
        _How(recipe, overrides, nodes, dry_run, as_json),
        sequences,
    )


@app.command("step")
def bench_step(
    run: Annotated[Path, typer.Option(help="A run directory; the run may still go on.")],
    warm_up: Annotated[int, typer.Option(min=0, help="Steps that are not counted.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Where the time of whole training steps goes: rollout, score, update, sync; and tokens a second.

    Example: fp16rl bench step --run runs/tiny-dense-grpo-fp16
    """
    from megatron_fp16rl.tools.bench import step as bench

    _show("step", bench.measure(run, warm_up), as_json)


@app.command("sanity")
def bench_sanity(
    only: Annotated[
        list[str] | None, typer.Option(help="An algorithm, e.g. gspo; several times. Default: all.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/sanity"),
    as_json: AsJson = False,
) -> None:
    """The paper's sanity test on a tiny model: its six algorithms and DPPO in FP16 and in BF16.

    A minute or two for each of the fourteen runs. Called again, it goes on where it stopped.

    Example: fp16rl bench sanity --only grpo --only gspo --set trainer.steps=50
    """
    from megatron_fp16rl.tools import sanity

    for name in only or []:
        if name not in sanity.ALGORITHMS:
            fail(f"--only {name}: there are {', '.join(sanity.ALGORITHMS)}", BAD_RECIPE)
    to = Console(stderr=True) if as_json else console
    try:
        rows = sanity.run(only or sanity.ALGORITHMS, out.resolve(), overrides or [], to)
    except KeyboardInterrupt:
        fail(f"interrupted; call it again to go on; what is done is in {out}", FAILED)
    curves = sanity.write_curves(out.resolve(), rows)
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    _print_rows(rows)
    console.print(f"curves: {curves}")


def _load(
    path: Path | None, overrides: list[str] | None, nodes: int | None, servers: bool = False
) -> Recipe:
    """The recipe to measure, on the ranks that a launcher started, or that --nodes is to start."""
    settings = overrides or []
    if nodes is not None:
        # Other settings may only be valid on the job's ranks.
        of_slurm = [setting for setting in settings if setting.startswith("slurm")]
        settings = [*settings, *job.settings(load_recipe(path, of_slurm), nodes, servers)]
    recipe = load_recipe(path, settings, launched())
    if servers:
        if recipe.rollout.replay is not None:
            fail("rollout.replay: there are no servers to measure; set it to null", BAD_RECIPE)
        check_model(recipe)
    return recipe


def _measure(
    name: str,
    measure: Callable[[Recipe, Say], Result | None],
    how: _How,
    sequences: int = 0,
) -> None:
    """Measures on the ranks that a launcher started, and rank 0 prints the result; or submits that as a job.

    sequences: which the data-parallel ranks are to share.
    """
    servers = name in ("sync", "rollout")
    recipe = _load(how.recipe, how.overrides, how.nodes, servers)
    ranks, replicas = recipe.learner.ranks, recipe.learner.data_parallel
    if name == "rollout":
        ranks = 1
    if sequences % replicas:
        of = f"the {replicas} data-parallel ranks"
        fail(f"--sequences {sequences} is not a multiple of {of}", BAD_RECIPE)
    if how.nodes is not None:
        command = in_job(sys.argv[1:], job.settings(recipe, how.nodes, servers))
        submitted = job.submit(recipe, f"bench-{name}", ranks, command, how.dry_run)
        show_job(submitted, how.as_json)
        return
    if ranks > 1 and launched() is None:
        fail(
            f"this takes {ranks} processes; start them, e.g. torchrun --nproc-per-node {ranks} "
            f"--no-python fp16rl bench {name} ...",
            BAD_RECIPE,
        )
    with joined() as rank, explained():
        result = measure(recipe, say if rank == 0 else lambda _: None)
        about = facts()
        if result is not None and rank == 0:
            _show(name, {**about, **result}, how.as_json)


def _show(name: str, result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"benchmark": name, **result}))
        return
    scalars = {key: value for key, value in result.items() if not isinstance(value, (list, dict))}
    console.print(", ".join(f"{key} {cell(value)}" for key, value in scalars.items()))
    _print_rows(result["rows"])
    for fault in result.get("faults", []):
        console.print(fault, style="yellow")


def _print_rows(rows: list[Result]) -> None:
    """As --json prints them."""
    cells = (map(cell, row.values()) for row in rows)
    console.print(table(rows[0] if rows else (), cells, box=SIMPLE_HEAD))


def _numbers(text: str, option: str) -> list[int]:
    """The numbers in a list such as "1,4,16"."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        fail(f"{option} {text}: write whole numbers above 0, e.g. 1,4,16", BAD_RECIPE)
    return [int(part) for part in parts]
