"""fp16rl bench: speed, and the sanity test."""

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from launch import command as job
from megatron_fp16rl.cli.common import (
    BAD_RECIPE,
    FAILED,
    AsJson,
    Overrides,
    console,
    explained,
    fail,
    say,
    show_job,
)
from megatron_fp16rl.recipe import TORCH_DTYPES, Recipe, RecipeError
from megatron_fp16rl.tools.bench import ranks as rank_processes
from megatron_fp16rl.tools.bench.common import Result, Say, View, job_overrides, load_recipe
from megatron_fp16rl.utils.files import write_json
from megatron_fp16rl.utils.terminal import Console

app = typer.Typer(help="Measure speed, here or as a Slurm job.", no_args_is_help=True)

Layers = Annotated[int, typer.Option(min=1, help="Of the random model.")]
Hidden = Annotated[int, typer.Option(min=64, help="Of the random model, a multiple of 64.")]
Repeats = Annotated[int, typer.Option(min=1, help="Of each measurement, after one to warm up.")]
Ranks = Annotated[
    int | None,
    typer.Option(
        min=1, help="Default: as many as a launcher started, the recipe's, or one a node."
    ),
]
_RESULT = "result.json"  # in a job's folder


@dataclass(frozen=True)
class Options:
    """The options that all benchmarks share; see `benchmark`."""

    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="What to measure; default: a random model and sums."),
    ] = None
    overrides: Overrides = None
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Run this as a Slurm job on so many nodes.")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --nodes: write and check the script only.")
    ] = False
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file as well.")] = None
    as_json: AsJson = False

    def load(
        self,
        ranks: int | None = None,
        more: tuple[str, ...] = (),
        servers: bool = False,
        **size: int,
    ) -> Recipe:
        """Loads the recipe to measure, and checks it against the nodes. Raises RecipeError.

        servers: whether the benchmark starts servers; more: further overrides; size: of the model.
        """
        if servers and (self.nodes or 1) > 1:
            raise RecipeError(
                "this benchmark starts servers on one node. For several, submit the recipe (fp16rl "
                "submit RECIPE --set trainer.steps=10), then: fp16rl bench step --run RUN_DIRECTORY"
            )
        of_job = job_overrides(self.nodes, servers) if self.nodes else []
        return load_recipe(self.recipe, [*(self.overrides or []), *more, *of_job], ranks, **size)

    def ranks(self, given: int | None) -> int | None:
        """The number of ranks; None: the recipe's."""
        return given or rank_processes.launched() or (None if self.recipe else self.nodes)

    def submit(self, name: str, recipe: Recipe, tasks: int = 1) -> bool:
        """With --nodes, submits this command line as a job. Returns whether it did."""
        if self.nodes is None or job.folder() is not None:
            return False
        submitted = job.submit(f"bench-{name}", recipe, self.dry_run, self.nodes, tasks)
        result = self.out or Path(submitted["script"]).parent / _RESULT
        show_job({**submitted, "result": str(result)}, self.as_json)
        return True

    def measure(
        self, name: str, view: View, ranks: int, measure: Callable[[Say], Result | None]
    ) -> None:
        """Measures on `ranks` ranks, which it starts unless a launcher has."""
        if ranks > 1 and rank_processes.launched() is None:
            raise typer.Exit(rank_processes.start(ranks))
        with rank_processes.joined() as rank, explained():
            from megatron_fp16rl.tools.bench.common import facts

            result = measure(say if rank == 0 else lambda _: None)
            about = facts()
            if result is not None and rank == 0:
                self.show(name, view, {**about, **result})

    def show(self, name: str, view: View, result: Result) -> None:
        """Prints a result, and writes it to --out or to the job's folder."""
        result = {"benchmark": name, **result}
        folder = job.folder()
        out = self.out or (folder and folder / _RESULT)
        if out is not None:
            write_json(out, result)
        if self.as_json:
            print(json.dumps(result))
            return
        console.print(view.table(result))
        if "summary" in result:
            console.print(result["summary"])
        for fault in result.get("faults", []):
            console.print(fault, style="yellow")


def benchmark(function: Callable[..., None]) -> Callable[..., None]:
    """A command that has the shared options besides its own; `function` gets them as `options`."""
    shared = inspect.signature(Options).parameters
    own = inspect.signature(function).parameters

    @functools.wraps(function)
    def command(**values: object) -> None:
        options = Options(**{field.name: values.pop(field.name) for field in fields(Options)})
        function(options, **values)

    parameters = [*own.values(), *shared.values()][1:]  # without `options`
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    command.__signature__ = inspect.Signature(keywords)
    command.__annotations__ = {p.name: p.annotation for p in keywords}
    return command


@app.command("collectives")
@benchmark
def bench_collectives(
    options: Options,
    ranks: Ranks = None,
    smallest: Annotated[int, typer.Option("--min-bytes", min=1)] = 1 << 10,
    largest: Annotated[int, typer.Option("--max-bytes", min=1)] = 16 << 20,
    factor: Annotated[int, typer.Option(min=2, help="From one size to the next.")] = 16,
    dtypes: Annotated[str, typer.Option(help="Any of fp16, bf16, fp32.")] = "fp16,bf16,fp32",
    groups: Annotated[
        str, typer.Option(help="Any of world, tensor, pipeline, expert, data.")
    ] = "world,tensor,pipeline,expert,data",
    operations: Annotated[str | None, typer.Option(help="E.g. all_reduce,all_to_all")] = None,
    repeats: Repeats = 10,
) -> None:
    """Latency and bandwidth between ranks: by operation, size, dtype and Megatron's groups.

    Every result is checked before it is timed. Bandwidths are those of NCCL-tests. Slow ranks are
    named.

    Examples:

        fp16rl bench collectives --ranks 4 --set learner.tensor_parallel=2

        fp16rl bench collectives --nodes 4 --recipe recipes/mine.yaml

        srun --nodes=4 --ntasks-per-node=8 --mpi=pmi2 fp16rl bench collectives --json

        torchrun --nproc-per-node 8 --no-python fp16rl bench collectives --groups world
    """
    from megatron_fp16rl.tools.bench import collectives as bench

    sweep = bench.Sweep(
        bench.sizes(smallest, largest, factor),
        _names(tuple(TORCH_DTYPES), dtypes, "--dtypes"),
        _names(tuple(bench.GROUPS), groups, "--groups"),
        _names(bench.OPERATIONS, operations or ",".join(bench.OPERATIONS), "--operations"),
        repeats,
    )
    layout = (recipe := options.load(options.ranks(ranks))).learner
    if not options.submit("collectives", recipe, layout.ranks):
        options.measure(
            "collectives", bench.VIEW, layout.ranks, lambda say: bench.measure(layout, sweep, say)
        )


@app.command("sync")
@benchmark
def bench_sync(
    options: Options,
    layers: Layers = 8,
    hidden: Hidden = 1024,
    transports: Annotated[str, typer.Option(help="Any of distributed, disk.")] = "distributed,disk",
    buckets: Annotated[str, typer.Option(help="MiB, e.g. 16,1024")] = "16,64,256,1024",
    repeats: Repeats = 5,
    scratch: Annotated[
        Path | None, typer.Option(help="Where `disk` writes, in sight of the servers.")
    ] = None,
) -> None:
    """Seconds that a learner takes to publish its weights to SGLang servers.

    By transport and bucket size, and as a fraction of a bare broadcast of as many bytes, turn by turn
    in the same run.

    Examples:

        fp16rl bench sync

        fp16rl bench sync --recipe recipes/mine.yaml --set rollout.servers=2 --buckets 256,1024
    """
    from megatron_fp16rl.tools.bench import sync as bench

    ways = bench.ways(
        _names(bench.TRANSPORTS, transports, "--transports"), _numbers(buckets, "--buckets")
    )
    recipe = options.load(servers=True, layers=layers, hidden=hidden)
    if not options.submit("sync", recipe):
        options.measure(
            *("sync", bench.VIEW, recipe.learner.ranks),
            lambda say: bench.measure(recipe, ways, repeats, scratch, say),
        )


@app.command("rollout")
@benchmark
def bench_rollout(
    options: Options,
    layers: Layers = 4,
    hidden: Hidden = 256,
    concurrency: Annotated[str, typer.Option(help="Responses in flight.")] = "1,4,16,64",
    repeats: Repeats = 5,
) -> None:
    """Tokens a second that rollouts collect, graded and recorded, by the responses in flight.

    And as a fraction of what the same prompts bring when they are sent straight to the servers.

    Examples:

        fp16rl bench rollout

        fp16rl bench rollout --recipe recipes/mine.yaml --concurrency 64,256,1024
    """
    counts = _numbers(concurrency, "--concurrency")
    recipe = options.load(servers=True, layers=layers, hidden=hidden)
    if not options.submit("rollout", recipe):
        from megatron_fp16rl.tools.bench import rollout as bench

        options.measure(
            *("rollout", bench.VIEW, 1), lambda say: bench.measure(recipe, counts, repeats, say)
        )


@app.command("learner")
@benchmark
def bench_learner(
    options: Options,
    ranks: Ranks = None,
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
) -> None:
    """Time whole Megatron steps in FP16 against fp32, turn by turn, at one or several layouts.

    Examples:

        fp16rl bench learner --json

        fp16rl bench learner --ranks 2 --layout tensor_parallel=2 --layout pipeline_parallel=2

        fp16rl bench learner --nodes 2 --recipe recipes/mine.yaml --dtypes fp16,bf16
    """
    from megatron_fp16rl.tools.bench import learner as bench

    work = bench.Work(sequences, tokens, repeats, _names(tuple(TORCH_DTYPES), dtypes, "--dtypes"))
    recipes = [
        options.load(
            options.ranks(ranks),
            tuple(f"learner.{pair}" for pair in text.split(",") if pair),
            layers=layers,
            hidden=hidden,
        )
        for text in layouts or [""]
    ]
    bench.check(recipes, work)
    count = recipes[0].learner.ranks
    if not options.submit("learner", recipes[0], count):
        options.measure("learner", bench.VIEW, count, lambda say: bench.measure(recipes, work, say))


@app.command("step")
@benchmark
def bench_step(
    options: Options,
    run: Annotated[
        Path | None, typer.Option(help="Of a run that there is already; nothing is started.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured, after those to warm up.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps that are not counted.")] = 1,
    layers: Layers = 4,
    hidden: Hidden = 256,
) -> None:
    """Where the time of whole training steps goes: rollout, score, update, sync; and tokens a second.

    Examples:

        fp16rl bench step --recipe recipes/tiny/dense-grpo-fp16.yaml

        fp16rl bench step --run runs/tiny-dense-grpo-fp16
    """
    from megatron_fp16rl.tools.bench import step as bench
    from megatron_fp16rl.tools.bench.common import facts

    if run is not None and (options.recipe is not None or options.nodes is not None):
        fail("--run measures a run that there is: give it without --recipe and --nodes", BAD_RECIPE)
    if run is None:
        from launch import local
        from launch.run_folder import new_run_folder

        # A warm start would take minutes, and is no part of a step.
        recipe = options.load(
            None, ("warm_start=null",), servers=True, layers=layers, hidden=hidden
        )
        if options.submit("step", recipe):
            return
        run = new_run_folder(Path(recipe.trainer.run_root), recipe.name).resolve()
        with contextlib.redirect_stdout(sys.stderr):
            local.run(bench.for_steps(recipe, warm_up + steps), run, say)
    options.show("step", bench.VIEW, {**facts(), **bench.measure(run, warm_up)})


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
    except KeyboardInterrupt:
        fail(f"interrupted; call it again to go on; what is done is in {out}", FAILED)
    path = page.write_curves(out.resolve(), rows)
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    console.print(page.table(rows))
    console.print(f"curves: {path}")


def _names(known: tuple[str, ...], text: str, option: str) -> list[str]:
    """The names in a list such as "fp16,bf16"."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            fail(f"{option} {text}: there is no {name!r}; there are {', '.join(known)}", BAD_RECIPE)
    return names


def _numbers(text: str, option: str) -> list[int]:
    """The numbers in a list such as "1,4,16"."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not all(name.isdigit() and int(name) for name in names):
        fail(f"{option} {text}: write whole numbers above 0, e.g. 1,4,16", BAD_RECIPE)
    return [int(name) for name in names]
