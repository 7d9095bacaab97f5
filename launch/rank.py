"""A learner rank: `python -m launch.rank RUN_DIR`, started by the supervisor of the run.

Rank 0 writes how the run ended into private/outcome; a rank that fails writes why; see launch/cause.py.
"""

import contextlib
import os
import secrets
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

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
    if lock.HELD not in os.environ:
        sys.exit(
            "ranks are started by fp16rl train, fp16rl submit or fp16rl-learner: two would write one run"
        )
    run(Path(sys.argv[1]))
    leave()


def leave() -> NoReturn:
    """Ends this process at once: threads or process groups may still wait for something."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader may be gone, or the disk full
            stream.flush()
    os._exit(0)


def run(folder: Path) -> None:
    """Runs this rank to the end of the run, and writes how it ended. Ends the process after an error."""
    try:
        with dropped_if_unread():
            word = _run(folder)
        if os.environ["RANK"] == "0":
            outcome.write(folder, word)
    except BaseException as error:
        try:
            _report(folder, error)
        finally:
            # At once: a collective that other ranks never join cannot be aborted (gloo), and an orderly
            # exit would wait for its timeout.
            os._exit(1)


def _run(folder: Path) -> str:
    from megatron_fp16rl.recipe import load

    recipe = load(folder / outcome.RECIPE_FILE)
    signals: list[int] = []
    if "RANK" not in os.environ:
        bootstrap.from_slurm(folder, recipe.slurm.interface if recipe.slurm else None)
        # Slurm sends SIGTERM to all tasks of a job that is preempted or out of time, and kills them later.
        # It also does so when one rank has died (--kill-on-bad-exit): so this process alone remembers it,
        # and the ranks that are started next do not.
        signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    rank = int(os.environ["RANK"])
    if rank == 0:  # space for the report of a full disk
        (folder / _RESERVE_FILE).parent.mkdir(mode=0o700, exist_ok=True)
        write_text(folder / _RESERVE_FILE, secrets.token_hex(_RESERVE_BYTES // 2), 0o600)
        _print_changes(folder, recipe)
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


def _print_changes(folder: Path, recipe: "Recipe") -> None:
    """Prints the recipe keys that changed since the last start: a change by mistake must be seen."""
    from megatron_fp16rl.recipe import RecipeError, load

    with contextlib.suppress(IndexError, RecipeError):  # a first start; people remove old logs
        before = load(outcome.attempts(folder)[-2] / outcome.RECIPE_FILE)
        for key, (old, new) in sorted(before.difference(recipe).items()):
            print(f"changed since the last start: {key}: {old!r} then, {new!r} now", flush=True)


def _report(folder: Path, error: BaseException) -> None:
    """Writes why this rank fails: to its log, to the supervisor, and whether it would fail again."""
    reason = f"{type(error).__name__}: {error}"
    if is_full(error):
        reason = f"no space left: {space_report(folder)}"
        (folder / _RESERVE_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the log may be on the full disk, too
        traceback.print_exc()
        print(reason, file=sys.stderr, flush=True)
        sys.stdout.flush()
    if _is_final(error):
        outcome.write(folder, outcome.FAILED, " ".join(reason.splitlines()))
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    cause.write_fault(outcome.attempt(folder), rank, cause.ERROR, reason)


def _is_final(error: BaseException) -> bool:
    """True for errors that a restart cannot fix."""
    return isinstance(error, FinalError) or is_full(error) or is_refused(error)


if __name__ == "__main__":
    main()
