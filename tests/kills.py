"""Kills at random moments: `python -m tests.kills OUT [--kills 100] [--seed K] [--set KEY=VALUE]`, prints JSON.

A run of two ranks learns from recorded samples and saves in the background, after every second step. Ranks,
the launcher, and processes that write checkpoints are killed, chosen and timed by the seed. Each time it goes
on: by itself, or by `fp16rl train --resume` after the launcher. At last its metrics are compared with those
of a run that was left alone. Not part of the tests: 12 take two minutes and more.
"""

import argparse
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil

from megatron_fp16rl.learner.checkpoint_files import available
from tests.runs import TINY, Run, learnt, make_run, replay, wait_for

STEPS = 3000  # more than it gets to
SETTINGS = [
    *("gates=[]", "checkpoint.background=true", "checkpoint.every=2", "trainer.eval_every=100000"),
    "trainer.max_restarts=1000",
]
VICTIMS = {"rank": 2, "launcher": 1, "writer": 3}  # and how often one is chosen


def main() -> None:
    """Kills, and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="of the recipe")
    chosen = parser.parse_args()
    (chosen.out / "recorded").mkdir(parents=True)
    settings = [*replay(chosen.out / "recorded", STEPS), *SETTINGS, *chosen.set]
    run = Run.of(chosen.out / "runs", settings)
    draw, kills, half = random.Random(chosen.seed), [], 0
    while len(kills) < chosen.kills:
        _wait_for_a_checkpoint(run)  # each time it gets further
        time.sleep(draw.uniform(0, 1))
        victim = draw.choices(list(VICTIMS), VICTIMS.values())[0]
        run, in_time, was_writing = _kill(run, victim, draw)
        if not in_time:
            continue
        kills.append(victim)
        half += was_writing
        print(f"{len(kills)}: {victim}, checkpoint {_newest(run)}", flush=True)
    _wait_for_a_checkpoint(run)
    run.launcher.send_signal(signal.SIGUSR1)
    code, said = run.end()
    assert code == 0, said
    rows = learnt(run.folder)
    # The last step of all has an evaluation.
    steps = f"trainer.steps={len(rows) + 1}"
    alone = [*settings, steps, "checkpoint.background=false", "checkpoint.every=100"]
    make_run(chosen.out / "alone", TINY, alone, timeout=3600)
    logs = "".join(f.read_text(errors="replace") for f in run.folder.glob("logs/*/rank_0.log"))
    report = {
        "kills": dict(Counter(kills)),
        "while_a_checkpoint_was_written": half,
        "starts": len(run.attempts),
        "steps": len(rows),
        "bit_exact": rows == learnt(chosen.out / "alone")[: len(rows)],
        "damaged_checkpoints": logs.count("set aside, going on from"),
    }
    print(json.dumps(report, indent=1))


def _wait_for_a_checkpoint(run: Run) -> None:
    done = _newest(run)
    run.wait_for(lambda: _newest(run) > done)


def _newest(run: Run) -> int:
    checkpoints = available(run.folder / "checkpoints")
    return checkpoints[0].step if checkpoints else 0


def _kill(run: Run, victim: str, draw: random.Random) -> tuple[Run, bool, bool]:
    """Kills it; returns the run that goes on, whether it was in time, and whether a checkpoint was being written."""
    starts, chosen = len(run.attempts), []
    while not chosen:
        family = psutil.Process(run.launcher.pid).children(recursive=True)
        writers = [p for p in family if _is_writer(p)]
        if victim == "launcher":
            chosen = [psutil.Process(run.launcher.pid)]
        else:
            chosen = writers if victim == "writer" else [run.rank(draw.randrange(2))]
        if chosen and victim == "writer":
            time.sleep(draw.uniform(0, 0.3))
            chosen = [p for p in chosen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    was_writing = bool(list((run.folder / "checkpoints").glob(".step_*")))
    before = _newest(run)
    draw.choice(chosen).kill()
    if victim != "launcher":
        # A writer may have been done a moment before: then there is nothing to restart.
        wait_for(
            lambda: (
                len(run.attempts) > starts or (victim == "writer" and _newest(run) > before + 4)
            ),
            *(120, lambda: run.said),
        )
        return run, len(run.attempts) > starts, was_writing
    run.launcher.wait()
    _, alive = psutil.wait_procs(family, 30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], "it outlived the launcher"
    newest = available(run.folder / "checkpoints")[0]
    assert newest.faults(newest.files()) == []
    return Run(run.folder.parent, "--resume", run.folder), True, was_writing


def _is_writer(process: psutil.Process) -> bool:
    try:
        return "megatron_fp16rl.learner.checkpoint_writer" in process.cmdline()
    except psutil.Error:
        return False


if __name__ == "__main__":
    main()
