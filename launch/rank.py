"""The entry point of a learner rank: `python -m launch.rank RUN_DIR` under any launcher.

Who it is, it learns from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets
them, or from srun's own variables.
"""

import contextlib
import errno
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from launch import bootstrap, outcome
from megatron_fp16rl.processes import PARENT_VARIABLE, die_with_parent

RECIPE_FILE = "recipe.yaml"
SERVERS = "private/servers"
HUNG = "private/hung"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# What gloo and NCCL say when another rank has gone.
_PEER_IS_GONE = ("gloo", "nccl", "connection closed by peer", "connection reset", "socket", "store")


def main() -> None:
    """Runs this rank to the end of the run. Exit code 0 only if it is done, or stopped on request."""
    folder = Path(sys.argv[1])
    if PARENT_VARIABLE not in os.environ and "SLURM_STEP_ID" in os.environ:
        _join_job_step(folder)
    die_with_parent()
    from megatron_fp16rl.recipe import load
    from megatron_fp16rl.train import train
    from megatron_fp16rl.watchdog import Watchdog

    try:
        recipe = load(folder / RECIPE_FILE)
        watchdog = Watchdog(folder / HUNG, int(os.environ["RANK"]), recipe.trainer.step_timeout_s)
        finished = train(
            recipe,
            folder,
            folder / SERVERS,
            watchdog.beat,
            lambda: outcome.is_asked_to_stop(folder),
        )
        if os.environ["RANK"] == "0":
            outcome.write(folder, outcome.DONE if finished else outcome.STOPPED)
    except BaseException as error:
        _explain(error, folder)
        sys.stdout.flush()
        sys.stderr.flush()
        # Leave at once: a collective that other ranks will never join cannot be aborted (gloo), and
        # an orderly exit would wait for its timeout.
        os._exit(1)


def _join_job_step(folder: Path) -> None:
    """Under srun: Slurm's SIGTERM says that the job is to end soon, and reaches every rank."""
    signal.signal(signal.SIGTERM, lambda *_: outcome.ask_to_stop(folder))
    if "RANK" not in os.environ:
        from megatron_fp16rl.recipe import load

        slurm = load(folder / RECIPE_FILE).slurm
        bootstrap.from_slurm(folder / "private", slurm.interface if slurm else None)


def _explain(error: BaseException, folder: Path) -> None:
    """Prints an error. Unless another rank's death is behind it, says that the run has failed."""
    from megatron_fp16rl.learner.faults import NonFinite

    traceback.print_exception(error)
    if is_peers_fault(error) or isinstance(error, KeyboardInterrupt | SystemExit):
        return
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, NonFinite):
        error.save(folder)
    if isinstance(error, OSError) and error.errno in _FULL:
        reason = f"{error}\n{_space(folder)}"
        print(reason, file=sys.stderr)
    with contextlib.suppress(OSError):  # the disk may be what failed
        outcome.write(folder, outcome.FAILED, reason)


def is_peers_fault(error: BaseException) -> bool:
    """Whether an error tells of the end of another rank, not of anything wrong here."""
    if isinstance(error, ConnectionError):
        return True
    if type(error).__module__.startswith("torch") and type(error).__name__.startswith("Dist"):
        return True
    said = str(error).lower()
    return type(error) is RuntimeError and any(word in said for word in _PEER_IS_GONE)


def _space(folder: Path) -> str:
    free = shutil.disk_usage(folder).free / 2**30
    return (
        f"{folder}: {free:.2f} GiB are free. Make room or make it writable, then go on with "
        f"--resume {folder}; the last whole checkpoint is as it was. A checkpoint takes about 14 "
        "bytes a parameter; checkpoint.keep_last says how many are kept"
    )


if __name__ == "__main__":
    main()
