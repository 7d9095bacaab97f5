"""Does a change leave every number of learning as it was? Four replayed runs, compared to the last bit.

    python -m tests.same_numbers record /tmp/numbers      # on the commit before; 10 minutes on two cores
    python -m tests.same_numbers check /tmp/numbers       # on the commit after; 6 minutes

`record` samples 20 steps of each run from real servers, then learns from the recorded samples; `check`
learns from the same samples and compares all metrics but times. `--only moe` takes one run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 20
RUNS = {
    "dense": ["recipes/tiny/dense-grpo-fp16.yaml"],  # TP 2
    "moe": ["recipes/tiny/moe-grpo-fp16.yaml"],  # EP 2, router replay
    "lora": ["recipes/tiny/lora-grpo-fp16.yaml"],
    "pp2": [
        "recipes/tiny/dense-grpo-fp16.yaml",
        "--set=learner.tensor_parallel=1",
        "--set=learner.pipeline_parallel=2",
    ],
}


def train(name: str, root: Path, *settings: str) -> Path:
    """Runs one of RUNS; returns the run directory."""
    command = [
        *(sys.executable, "-m", "megatron_fp16rl.cli", "train", *RUNS[name], "--name", name),
        *(f"--set={setting}" for setting in (f"trainer.steps={STEPS}", *settings)),
        f"--set=trainer.run_root={root}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{name}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return root / name


def replayed(name: str, folder: Path) -> list[dict]:
    """Metrics of a run that learns from the samples in folder/NAME/rollouts, without times."""
    with tempfile.TemporaryDirectory() as root:
        run = train(name, Path(root), f"rollout.replay={folder.resolve() / name / 'rollouts'}")
        lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")} for row in rows
    ]


def record(name: str, folder: Path) -> None:
    """Leaves folder/NAME/rollouts and folder/NAME/metrics.json."""
    (folder / name).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as root:
        run = train(name, Path(root), "rollout.record=true")
        shutil.copytree(run / "rollouts", folder / name / "rollouts")
    (folder / name / "metrics.json").write_text(json.dumps(replayed(name, folder)))


def differences(before: list[dict], after: list[dict]) -> list[str]:
    """One line for each key that differs: its first step and both values."""
    if len(before) != len(after):
        return [f"{len(before)} steps before, {len(after)} after"]
    found: dict[str, str] = {}
    for old, new in zip(before, after, strict=True):
        for key in sorted(old.keys() | new.keys()):
            # As text: NaN is NaN, and every bit of a float counts.
            if json.dumps(old.get(key)) != json.dumps(new.get(key)):
                found.setdefault(key, f"step {old['step']}: {key} {old.get(key)} -> {new.get(key)}")
    return list(found.values())


def main() -> int:
    """Returns 1 if a number differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["record", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=RUNS, action="append")
    asked = parser.parse_args()
    failed = False
    for name in asked.only or RUNS:
        if asked.what == "record":
            record(name, asked.folder)
            print(f"{name}: recorded {STEPS} steps", flush=True)
            continue
        before = json.loads((asked.folder / name / "metrics.json").read_text())
        apart = differences(before, replayed(name, asked.folder))
        failed = failed or bool(apart)
        verdict = "the same to the last bit" if not apart else "\n  ".join(["differs", *apart])
        print(f"{name}: {STEPS} steps, {verdict}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
