"""What the benchmarks' commands share."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from launch import command, slurm
from megatron_fp16rl.cli.common import BAD_RECIPE, FAILED, console, fail, say, show_job
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.tools.bench import ranks, settings
from megatron_fp16rl.utils.files import write_json

RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="What to measure; default: a random model and sums."),
]
Layers = Annotated[int, typer.Option(min=1, help="Of the random model.")]
Hidden = Annotated[int, typer.Option(min=64, help="Of the random model, a multiple of 64.")]
Repeats = Annotated[int, typer.Option(min=1, help="Of each measurement, after one to warm up.")]
Ranks = Annotated[
    int | None,
    typer.Option(
        min=1, help="Default: as many as a launcher started, the recipe's, or one a node."
    ),
]
Nodes = Annotated[int | None, typer.Option(min=1, help="Run this as a Slurm job on so many nodes.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="With --nodes: write and check the script only.")
]
Out = Annotated[Path | None, typer.Option(help="Write the JSON to this file as well.")]
Say = Callable[[str], None]
_RESULT = "result.json"  # in a job's folder


@dataclass(frozen=True)
class Asked:
    """What every benchmark is told. servers: whether it starts some."""

    name: str
    servers: bool
    recipe: Path | None
    overrides: list[str] | None
    nodes: int | None
    dry_run: bool
    out: Path | None
    as_json: bool

    def load(self, ranks: int | None = None, more: tuple[str, ...] = (), **size: int) -> Recipe:
        """The recipe to measure, which the nodes hold. Raises RecipeError."""
        if self.servers and (self.nodes or 1) > 1:
            raise RecipeError(
                f"bench {self.name} starts servers on one node. For several, submit the recipe (fp16rl "
                "submit RECIPE --set trainer.steps=10), then: fp16rl bench step --run RUN_DIRECTORY"
            )
        job = settings.on_nodes(self.nodes, self.servers) if self.nodes else ()
        overrides = [*(self.overrides or []), *more, *job]
        return settings.recipe(self.recipe, overrides, ranks, **size)

    def ranks(self, given: int | None) -> int | None:
        """How many ranks there are to be; None: as the recipe says."""
        return given or ranks.launched() or (None if self.recipe else self.nodes)

    def submits(self, recipe: Recipe, tasks: int = 1) -> bool:
        """Whether this is to be a job, which it then is. Raises SlurmError."""
        if self.nodes is None or command.folder() is not None:
            return False
        job = command.Job("bench.sbatch.j2", f"bench-{self.name}", self.nodes, tasks)
        submitted = command.submit(job, recipe, self.dry_run)
        result = self.out or Path(submitted["script"]).parent / _RESULT
        show_job({**submitted, "result": str(result)}, self.as_json)
        return True

    def measure(
        self, count: int, measure: Callable[[Say], dict | None], table: Callable[[dict], Table]
    ) -> None:
        """Measures as one of `count` ranks; starts them on this machine if nothing else has."""
        if count > 1 and ranks.launched() is None:
            raise typer.Exit(ranks.start(count))
        with ranks.joined() as rank, explained():
            from megatron_fp16rl.tools.bench.facts import facts

            result = measure(say if rank == 0 else lambda _: None)
            found = facts()
            if rank == 0:
                self.finish({**found, **result}, table)

    def finish(self, result: dict, table: Callable[[dict], Table]) -> None:
        """Prints a result, and writes it where it is wanted."""
        result = {"benchmark": self.name, **result}
        job = command.folder()
        out = self.out or (job and job / _RESULT)
        if out is not None:
            write_json(out, result)
        if self.as_json:
            print(json.dumps(result))
            return
        console.print(table(result))
        for line in (*result.get("outliers", []), *result.get("faults", [])):
            console.print(line, style="yellow")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Errors that a message explains end the program with it."""
    from launch.bootstrap import BootstrapError
    from launch.local import RankDied
    from megatron_fp16rl.rollout.server import ServerDied

    try:
        yield
    except RecipeError as error:
        fail(str(error), BAD_RECIPE)
    except (slurm.SlurmError, BootstrapError, ServerDied, RankDied) as error:
        fail(str(error), FAILED)


def one_of(known: tuple[str, ...], text: str, option: str) -> list[str]:
    """The names in a list such as "fp16,bf16"."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            fail(f"{option} {text}: there is no {name!r}; there are {', '.join(known)}", BAD_RECIPE)
    return names


def numbers(text: str, option: str) -> list[int]:
    """The numbers in a list such as "1,4,16"."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not all(name.isdigit() and int(name) for name in names):
        fail(f"{option} {text}: write whole numbers above 0, e.g. 1,4,16", BAD_RECIPE)
    return [int(name) for name in names]
