"""A run that is killed again and again: `python -m tests.killed FOLDER KILLS`, prints JSON.

Two ranks train and write a checkpoint after every update. They are forked from one process that has
imported everything, so that they are up in a moment; each attempt is ended by SIGKILL at a random
time or while a checkpoint is half written, in turn, and the next goes on from what it finds.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

RANKS = 2


def main() -> None:
    """Kills, resumes, and compares with a run that was left alone."""
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    # Nothing is done with them here: the ranks find them imported.
    import megatron_fp16rl.platform.cpu as cpu

    cpu.prepare_learner()
    import megatron.core.parallel_state  # noqa: F401

    import megatron_fp16rl.learner.checkpoint  # noqa: F401
    from megatron_fp16rl.learner.checkpoint_files import Checkpoint

    clock, seen = random.Random(0), []
    for kill in range(kills):
        before = _newest(root)
        ranks = _start(root / "killed", last=10**6)
        while _newest(root) == before:  # every attempt gets a step further before it is killed
            assert not any(os.waitpid(pid, os.WNOHANG)[0] for pid in ranks), "a rank ended"
            time.sleep(0.005)
        if kill % 2:
            _stop_in_a_checkpoint(root / "killed" / "checkpoints", ranks, clock)
        else:
            time.sleep(clock.uniform(0, 0.4))
        clock.shuffle(ranks)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            time.sleep(clock.choice((0, 0.1)))  # at once, or the other in the lurch for a while
            os.waitpid(pid, 0)
        latest = Checkpoint((root / "killed" / "checkpoints" / "latest").resolve())
        leftovers = list(latest.path.parent.glob(".step_*"))
        seen.append([latest.step, latest.faults(latest.files()), len(leftovers)])
    last = _newest(root) + 2
    for name in ("killed", "alone"):
        codes = [os.waitpid(pid, 0)[1] for pid in _start(root / name, last)]
        assert not any(codes), codes
    print(
        json.dumps(
            {"seen": seen, "killed": _losses(root / "killed"), "alone": _losses(root / "alone")}
        )
    )


def _stop_in_a_checkpoint(folder: Path, ranks: list[int], clock: random.Random) -> None:
    """Stops the ranks at a random moment at which a checkpoint is half written."""
    while True:
        time.sleep(clock.uniform(0, 0.02))
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        # Looked for while all stand still: a checkpoint is done within milliseconds.
        if list(folder.glob(".step_*")):
            return
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)


def _newest(root: Path) -> int:
    from megatron_fp16rl.learner.checkpoint_files import available

    checkpoints = available(root / "killed" / "checkpoints")
    return checkpoints[0].step if checkpoints else 0


def _start(folder: Path, last: int) -> list[int]:
    from megatron_fp16rl.utils.processes import free_port, local_rank_environment

    folder.mkdir(exist_ok=True)
    port, pids = free_port("127.0.0.1"), []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            os.environ.update(local_rank_environment(rank, RANKS, port))
            code = 1
            try:
                _rank(folder, last)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def _rank(folder: Path, last: int) -> None:
    """One rank: from the newest checkpoint to step `last`."""
    from megatron_fp16rl.learner import checkpoint
    from megatron_fp16rl.learner.checkpoint_files import available, prune
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.models.build import model_folder
    from tests import models
    from tests.workers import common

    world = common.join_world(distributed_optimizer=True)
    recipe = models.recipe(
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 5},
        learner={
            "ranks": RANKS,
            "distributed_optimizer": True,
            "global_batch_size": 16,
            "optimizer": {"lr": 1e-4},
        },
    )
    like = model_folder(recipe.model)
    learner = Learner.from_recipe(recipe, like, world)
    saved = folder / "checkpoints"
    checkpoints, step = world.broadcast_from_rank0(available(saved)), 0
    if checkpoints:
        step = checkpoint.load(learner, checkpoints[0]).step
    batch = common.my_share(common.answered(), world)
    while step < last:
        _, loss = learner.supervised_update(batch)
        if world.is_rank0:
            with (folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps([step, loss]) + "\n")
        step += 1
        checkpoint.save(learner, saved, checkpoint.Progress(step, step), like)
        if world.is_rank0:
            prune(saved, 2, None)


def _losses(folder: Path) -> list[list[float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
