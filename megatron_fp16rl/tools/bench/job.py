"""A benchmark, or a selftest, as a Slurm job: the same command line, on several tasks."""

from collections.abc import Sequence
from pathlib import Path

from launch import batch_script, outcome, slurm
from launch.run_folder import new_run_folder
from launch.sbatch import Step
from megatron_fp16rl.recipe import Recipe, RecipeError
from megatron_fp16rl.tools.bench.common import Result
from megatron_fp16rl.utils.files import write_text


def settings(recipe: Recipe, nodes: int, starts_servers: bool) -> list[str]:
    """Overrides with which a recipe is measured on `nodes` nodes. Raises RecipeError."""
    if recipe.slurm is None:
        raise RecipeError(batch_script.NO_SECTION)
    if starts_servers:
        if nodes > 1:
            raise RecipeError(
                f"--nodes {nodes}: this benchmark starts servers on one node. For several, submit the recipe "
                "(fp16rl submit RECIPE --set trainer.steps=10), then: fp16rl bench step --run RUN_DIRECTORY"
            )
        return ["slurm.learner_nodes=1", "slurm.rollout_nodes=0"]
    ranks = nodes * max(1, recipe.slurm.gpus_per_node)
    # One small server on another node keeps the recipe valid, and takes no device of the ranks.
    elsewhere = ("slurm.rollout_nodes=1", "rollout.servers=1", "rollout.tensor_parallel=1")
    return [f"slurm.learner_nodes={nodes}", f"learner.ranks={ranks}", *elsewhere]


def submit(recipe: Recipe, name: str, tasks: int, command: Sequence[str], dry_run: bool) -> Result:
    """Writes a script that runs `fp16rl COMMAND` on so many tasks, checks it, and puts it into the queue.

    Raises SlurmError.
    """
    assert recipe.slurm is not None
    # It is not asked to save, nor put back into the queue.
    options = {"signal": False, "requeue": False, **recipe.slurm.options}
    section = recipe.slurm.model_copy(update={"rollout_nodes": 0, "options": options})
    folder = new_run_folder(Path(recipe.trainer.run_root), name).resolve()
    for part in ("logs", "private"):
        (folder / part).mkdir(mode=0o700)
    script = folder / batch_script.SCRIPT
    text = batch_script.render(
        recipe.model_copy(update={"slurm": section}),
        folder,
        step=Step(section.learner_nodes, tasks),
        command=command,
    )
    write_text(folder / outcome.COMMAND, "".join(f"{word}\n" for word in command))
    write_text(script, text)
    check = slurm.check(text) if slurm.available() else None
    return {
        "run": str(folder),
        "script": str(script),
        "output": str(folder / "logs" / "slurm.out"),
        "result": str(folder / "result.json"),
        "check": check,
        "jobs": [] if dry_run else [slurm.submit(script)],
    }
