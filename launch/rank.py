"""The entry point of a learner rank: `python -m launch.rank RUN_DIR` under any launcher.

Who it is, it takes from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT if the launcher
gives them, as ours and torchrun do; else from MPI or from srun. How the run ended is in
private/outcome; see launch/outcome.py, and launch/cause.py.
"""

import contextlib
import os
import secrets
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import bootstrap, cause, lock, outcome
from megatron_fp16rl.learner.checkpoint_files import space_report
from megatron_fp16rl.utils.errors import FinalError
from megatron_fp16rl.utils.files import is_full, is_refused, write_text
from megatron_fp16rl.utils.output import dropped_if_unread
from megatron_fp16rl.utils.processes import die_with_parent

if TYPE_CHECKING:
    from megatron_fp16rl.recipe import Recipe

_RESERVE_FILE = "private/reserve"
_RESERVE_BYTES = 1 << 18


def main() -> None:
    """Runs this rank to the end of the run, and ends this process."""
    die_with_parent()
    run(Path(sys.argv[1]))
    leave()


def leave() -> None:
    """Ends this process, which has done all: nothing that a thread or a group still waits for matters."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it may be gone, or the disk full
            stream.flush()
    os._exit(0)


def run(folder: Path) -> None:
    """Runs this rank to the end of the run, and writes how it ended; after an error nothing returns."""
    try:
        with dropped_if_unread(), _alone_in(folder):
            word = _run(folder)
        if os.environ["RANK"] == "0":
            outcome.write(folder, word)
    except BaseException as error:
        try:
            _last_words(folder, error)
        finally:
            # Leave at once: a collective that other ranks will never join cannot be aborted (gloo),
            # and an orderly exit would wait for its timeout.
            os._exit(1)


def _alone_in(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The run's lock, for rank 0, unless whoever started the ranks holds it. Raises RunInUse."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    if rank != "0" or lock.HELD in os.environ:
        return contextlib.nullcontext()
    return lock.alone_in(folder, lock.this_job())


def _run(folder: Path) -> str:
    from megatron_fp16rl.recipe import load

    recipe = load(folder / outcome.RECIPE_FILE)
    signals: list[int] = []
    if bootstrap.from_launcher(folder, recipe.slurm and recipe.slurm.interface):
        # Slurm sends SIGTERM to all processes of a job that is preempted or whose time is up, and
        # kills what is left of it later. It also does so when one rank has died (--kill-on-bad-exit):
        # so this is remembered by the process alone, and not left to the ranks that come after it.
        signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    bootstrap.check_ranks(recipe.learner.ranks)
    rank = int(os.environ["RANK"])
    if rank == 0:  # what is to be said when the disk is full
        (folder / _RESERVE_FILE).parent.mkdir(mode=0o700, exist_ok=True)
        write_text(folder / _RESERVE_FILE, secrets.token_hex(_RESERVE_BYTES // 2), 0o600)
        for change in _changes(folder, recipe):
            print(f"changed since the last start: {change}", flush=True)
    from megatron_fp16rl.utils.watchdog import Watchdog

    logs = outcome.attempt(folder)
    watchdog = Watchdog(
        recipe.trainer.step_timeout_s,
        logs / "hung",
        lambda reason, where: cause.write_fault(logs, rank, cause.HANG, reason, where),
    )
    watchdog.beat("the start", recipe.rollout.start_timeout_s)
    from megatron_fp16rl.learner.nonfinite import NonFinite
    from megatron_fp16rl.train import train

    def is_asked_to_stop() -> bool:
        return bool(signals) or outcome.is_asked_to_stop(folder)

    try:
        done = train(recipe, folder, folder / outcome.SERVERS, watchdog, is_asked_to_stop)
    except NonFinite as fault:
        fault.save(folder)
        raise
    watchdog.close()
    return outcome.DONE if done else outcome.STOPPED


def _changes(folder: Path, recipe: "Recipe") -> list[str]:
    """The keys of the recipe that were others when the run was last started, on purpose or by an edit.

    What may not change is refused where it is used: see learner/checkpoint.py.
    """
    from megatron_fp16rl.recipe import RecipeError, load

    try:
        before = load(outcome.attempts(folder)[-2] / outcome.RECIPE_FILE)
    except (IndexError, RecipeError):
        return []
    old, new = _flat(before.model_dump()), _flat(recipe.model_dump())
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in keys]


def _flat(values: dict[str, Any], start: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, dict) and value
        flat |= _flat(value, f"{start}{name}.") if is_section else {f"{start}{name}": value}
    return flat


def _last_words(folder: Path, error: BaseException) -> None:
    """Says why this rank fails: in its log, to the launcher, and whether it would fail again."""
    reason = f"{type(error).__name__}: {error}"
    if is_full(error):
        reason = f"no space left: {space_report(folder)}"
        (folder / _RESERVE_FILE).unlink(missing_ok=True)  # room for what follows
    with contextlib.suppress(OSError):  # the log, too, may be on the disk that is full
        traceback.print_exc()
        print(reason, file=sys.stderr, flush=True)
        sys.stdout.flush()
    if isinstance(error, lock.RunInUse):
        return  # nothing here is this run's to write
    if _is_final(error):
        outcome.write(folder, outcome.FAILED, " ".join(reason.splitlines()))
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    cause.write_fault(outcome.attempt(folder), rank, cause.ERROR, reason)


def _is_final(error: BaseException) -> bool:
    """Whether the ranks would only come to the same end again."""
    return isinstance(error, FinalError) or is_full(error) or is_refused(error)


if __name__ == "__main__":
    main()
