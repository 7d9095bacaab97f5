"""A recipe becomes a batch script, by slurm/job.sbatch.j2."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from launch import sbatch
from launch.outcome import RECIPE_FILE
from launch.run_folder import absolute
from launch.sbatch import Step
from megatron_fp16rl.recipe import Recipe, RecipeError, Slurm
from megatron_fp16rl.utils import cache
from megatron_fp16rl.utils.files import write_text
from megatron_fp16rl.utils.processes import answer

PROJECT = Path(__file__).parent.parent
SCRIPT = "job.sbatch"
DRAFT = "draft.sbatch"  # of a job that would go on with a run, until Slurm has taken it
NO_SECTION = (
    "there is no slurm: section; add one, e.g. "
    "slurm: {options: {account: ..., partition: ...}, learner_nodes: 1, gpus_per_node: 8}"
)
_BASH = "/bin/bash"
_CHECK_TIMEOUT_S = 60


def write(recipe: Recipe, folder: Path, chain: bool = False) -> Path:
    """Writes the resolved recipe and the batch script into a run directory; returns the script.

    chain: the job waits until no other of its name and user runs.
    """
    script = render(recipe, folder, chain)
    write_text(folder / RECIPE_FILE, absolute(recipe).to_yaml())
    (folder / "logs").mkdir(exist_ok=True)
    write_text(folder / SCRIPT, script)
    return folder / SCRIPT


def render(
    recipe: Recipe,
    folder: Path,
    chain: bool = False,
    step: Step | None = None,
    command: Sequence[str] = (),
) -> str:
    """The batch script of a recipe that runs in `folder`. Raises RecipeError if there can be none.

    step, command: for a job that runs `fp16rl COMMAND` on the tasks of a step, and no training.
    """
    if recipe.slurm is None:
        raise RecipeError(NO_SECTION)
    slurm = _with_container_paths(recipe, recipe.slurm)
    _check_bash(slurm.setup)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PROJECT / "slurm"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["quote"] = _quoted
    learner, servers = sbatch.steps(recipe, slurm)
    program = _program(slurm, folder)
    return templates.get_template("job.sbatch.j2").render(
        recipe=recipe,
        slurm=slurm,
        folder=folder,
        project=PROJECT,
        submitted_from=Path.cwd(),
        options=sbatch.options(recipe, slurm, folder, chain),
        learner=step or learner,
        command=command,
        servers=servers,
        preflight=_preflight(slurm),
        srun_options=_pyxis_options(slurm, folder),
        program=program,
        host_python="python3" if slurm.container else program,
    )


def _check_bash(setup: Sequence[str]) -> None:
    """Raises RecipeError if lines do not end what they begin: they would swallow the lines after them."""
    if not setup or not Path(_BASH).exists():
        return
    done = answer([_BASH, "-n"], _CHECK_TIMEOUT_S, input="\n".join(setup) + "\n")
    if done.stderr:
        raise RecipeError(f"slurm.setup: {done.stderr.strip().replace(f'{_BASH}: ', '')}")


def _preflight(slurm: Slurm) -> Step | None:
    """A task on each node; none without MPI, nor with one node."""
    has_one = slurm.mpi != "none" and slurm.nodes > 1
    return Step(slurm.nodes, slurm.nodes) if has_one else None


def _quoted(value: object) -> str:
    """One word of bash. shlex leaves commas bare, which in an array look like a mistake."""
    word = shlex.quote(str(value))
    return f"'{word}'" if "," in word and word == str(value) else word


def _program(slurm: Slurm, folder: Path) -> str:
    """Python, in the container if there is one; quoted for bash."""
    if slurm.container is None:
        return shlex.quote(sys.executable)
    if slurm.container.runtime == "pyxis":
        return "python3"
    binds = _mounts(slurm.container.mounts, folder)
    words = ["apptainer", "exec", "--nv", "--bind", binds, "--pwd", str(PROJECT)]
    return shlex.join([*words, slurm.container.image, "python3"])


def _pyxis_options(slurm: Slurm, folder: Path) -> list[str]:
    """srun's options for a container that Pyxis starts."""
    if slurm.container is None or slurm.container.runtime != "pyxis":
        return []
    return [
        f"--container-image={slurm.container.image}",
        f"--container-mounts={_mounts(slurm.container.mounts, folder)}",
        f"--container-workdir={PROJECT}",
    ]


def _mounts(more: Sequence[str], folder: Path) -> str:
    mounts = [f"{folder}:{folder}", f"{PROJECT}:{PROJECT}", *more]
    for mount in mounts:
        if "," in mount or mount.count(":") > 2:
            raise RecipeError(
                f"slurm.container: {mount!r} cannot be mounted, since , and : part mounts: choose a path "
                "without them"
            )
    return ",".join(mounts)


def _with_container_paths(recipe: Recipe, slurm: Slurm) -> Slurm:
    """The section with everything in `mounts` and `environment` that the job needs in its container.

    Mounted are the files that the recipe names and the caches of models and compiled kernels, where no
    mount of the recipe holds them. A container's home is another one, and is lost: so the environment
    says where the caches are.
    """
    if slurm.container is None:
        return slurm
    caches = {"HF_HOME": Path.home() / ".cache" / "huggingface", "FP16RL_CACHE": cache.root()}
    environment = {name: os.environ.get(name, str(path)) for name, path in caches.items()}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):  # which need not be below HF_HOME
        if name in os.environ:
            environment[name] = os.environ[name]
    for name, place in environment.items():
        place = slurm.environment.get(name) or place
        environment[name] = str(Path(place).expanduser().absolute())
    Path(environment["FP16RL_CACHE"]).mkdir(parents=True, exist_ok=True)  # Pyxis needs it to exist
    mounts = [mount.split(":") for mount in slurm.container.mounts]
    visible = [PROJECT, *(Path(m[0]) for m in mounts if m[1:2] in ([], [m[0]]))]
    mounted = []
    for path in sorted({*_files(recipe), *map(Path, environment.values())}):
        if path.exists() and not any(path.is_relative_to(other) for other in visible):
            visible.append(path)
            mounted.append(f"{path}:{path}")
    update = {"mounts": [*slurm.container.mounts, *mounted]}
    container = slurm.container.model_copy(update=update)
    merged = {**environment, **slurm.environment}
    return slurm.model_copy(update={"container": container, "environment": merged})


def _files(recipe: Recipe) -> Iterator[Path]:
    """The folders of all files that the recipe names by an absolute path, as run directories have them."""
    values = absolute(recipe).model_dump()
    suites = [suite["suite"].rpartition(":")[0] for suite in values["trainer"]["suites"]]
    loss = values["algorithm"]["loss"]
    for text in _texts([values["model"], values["task"], values["rollout"], suites, loss]):
        if text.startswith("/") and "\n" not in text:
            path = Path(text)
            # A file's folder: a reward may import its neighbours. But no root or home is mounted for one.
            alone = path.parent in (Path("/"), Path.home())
            yield path if path.is_dir() or alone else path.parent


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
