"""fp16rl-learner: a run whose ranks mpirun starts, or srun with --mpi."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_fp16rl.cli.common import (
    BAD_RECIPE,
    FAILED,
    Overrides,
    Resume,
    fail,
    load_recipe,
    recipe_file,
)
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.utils.errors import ExplainedError


def learner(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, e.g. recipes/tiny/dense-grpo-fp16.yaml")
    ] = None,
    overrides: Overrides = None,
    resume: Resume = None,
) -> None:
    """Run a recipe on the processes that mpirun, or srun with --mpi, starts: learner.ranks of them.

    Examples:

        mpirun -n 2 fp16rl-learner recipes/tiny/dense-grpo-fp16.yaml

        srun --mpi=pmi2 --ntasks=16 fp16rl-learner recipes/mine.yaml --set trainer.steps=100
    """
    source = recipe_file(recipe, resume)
    from launch import mpi
    from launch.bootstrap import mpi_rank

    try:
        mpi.run(lambda ranks: _prepare(source, overrides or [], resume, ranks))
    except ExplainedError as error:
        code = BAD_RECIPE if isinstance(error, RecipeError) else FAILED
        if mpi_rank():  # rank 0 says it
            raise typer.Exit(code) from None
        fail(str(error), code)


def _prepare(
    source: Path, overrides: list[str], resume: Path | None, ranks: int
) -> tuple[Recipe, Path]:
    """The resolved recipe and the run directory."""
    from launch import status
    from launch.run_folder import absolute, new_run_folder
    from megatron_fp16rl.models.build import model_folder

    recipe = absolute(load_recipe(source, overrides))
    if recipe.learner.ranks != ranks:
        raise RecipeError(
            f"MPI started {ranks} processes, the recipe has learner.ranks={recipe.learner.ranks}; "
            f"start that many, or say --set learner.ranks={ranks}"
        )
    model_folder(recipe.model)
    if resume is not None:
        folder = resume.resolve()
        status.check_free(*status.read([folder]))
        return recipe, folder
    return recipe, new_run_folder(Path(recipe.trainer.run_root), recipe.name).resolve()


def main() -> None:
    """The `fp16rl-learner` command."""
    typer.run(learner)


if __name__ == "__main__":
    main()
