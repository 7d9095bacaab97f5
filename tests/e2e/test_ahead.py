"""`rollout.ahead` with real engines: which weights sampled what, and resumes with what is in hand and in flight."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from megatron_fp16rl.recipe import Recipe
from tests import models
from tests.conftest import python
from tests.e2e.test_train import learnt, rows, train

REWARD = """
def score(prompt: str, response: str, answer: str) -> float:
    return response.count("1") / max(1, len(response))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe whose random model finds a reward at once.

    One leader: where requests of two meet in a server, chance decides in which batch each is rounded.
    """
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "reward.py").write_text(REWARD)
    problems = [json.dumps({"problem": f"{n}+1=", "answer": str(n + 1)}) for n in range(64)]
    (folder / "problems.jsonl").write_text("\n".join(problems))
    one = models.recipe(
        task={
            "kind": "dataset",
            "path": str(folder / "problems.jsonl"),
            "template": "none",
            "instruction": "",
            "reward": {"kind": "function", "path": f"{folder}/reward.py:score", "workers": 1},
        },
        rollout={
            "prompts": 8,
            "samples": 4,
            "max_new_tokens": 12,
            "ahead": 1,
            "deterministic": True,
            "record": True,
        },
        algorithm={"old_policy": "rollout"},
        learner={
            "ranks": 2,
            "tensor_parallel": 2,
            "global_batch_size": 16,
            "optimizer": {"lr": 1e-3},
        },
        trainer={"steps": 5, "eval_every": 100, "eval_prompts": 4},
        checkpoint={"every": 2, "keep_last": 3},
        precision={"loss_scale": {"initial": 1024.0}},
    )
    (folder / "recipe.yaml").write_text(one.to_yaml())
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    train(root, "trainer.steps=5", recipe=recipe)
    return root / "tiny"


def resume(folder, at, *settings):
    """Goes on with a copy of a run from one of its checkpoints; returns the copy."""
    copy = Path(tempfile.mkdtemp(dir=folder.parent)) / folder.name
    shutil.copytree(folder, copy, symlinks=True)
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    python(*("-m", "megatron_fp16rl.cli", "train"), "--resume", copy, "--at", at, *arguments)
    return copy


def test_every_batch_is_of_the_weights_before_and_says_so(run):
    recorded = rows(run)
    assert [row["staleness/versions_mean"] for row in recorded] == [0, 1, 1, 1, 1]
    assert [row["sync/version"] for row in recorded] == [1, 2, 3, 4, 5]
    for row in recorded:
        # No pass of its own: neither loss nor metric needs it.
        assert row["time/score_s"] < row["time/update_s"]
        assert row["grad/norm"] > 0
    # Step 0 is on policy: what its update saw is what servers and learner round differently.
    assert recorded[0]["staleness/logprob_abs_mean"] < 5e-3
    assert all(row["staleness/logprob_abs_mean"] > 0.01 for row in recorded[1:])
    # Rounding alone, where the servers scored sequences again: at the first step, and at the last.
    assert ["mismatch/logprob_abs_mean" in row for row in recorded] == [True, *[False] * 3, True]
    assert all(0 < recorded[i]["mismatch/logprob_abs_mean"] < 5e-3 for i in (0, 4))


def test_what_was_sampled_is_of_the_version_that_is_recorded(run):
    for step in range(5):
        lines = (run / "rollouts" / f"step_{step:05}.leader_0.jsonl").read_text().splitlines()
        assert {json.loads(line)["version"] for line in lines} == {max(0, step - 1)}


def test_a_resumed_run_takes_the_batch_in_hand_and_goes_on_to_the_last_bit(run):
    batch = sorted(path.name for path in (run / "checkpoints/step_2/rollouts").iterdir())
    assert batch == ["metrics.json", "step_00002.leader_0.jsonl"]
    assert not (run / "checkpoints/step_5/rollouts").exists()
    copy = resume(run, 2)
    assert learnt(copy) == learnt(run)


def test_another_layout_takes_the_batch_in_hand_too(run):
    """Two data-parallel ranks in place of two tensor-parallel ones: each takes its share of the prompts."""
    copy = resume(run, 4, "learner.tensor_parallel=1")
    one, two = rows(copy)[-1], rows(run)[-1]
    for key in ("batch/prompts_digest", "reward/mean", "staleness/versions_mean", "tokens/step"):
        assert one[key] == pytest.approx(two[key]), key
    assert one["staleness/logprob_abs_mean"] == pytest.approx(
        two["staleness/logprob_abs_mean"], rel=0.05
    )


def test_recorded_batches_are_learnt_to_the_same_bits(run, recipe, tmp_path):
    replay = [f"rollout.replay={run}/rollouts", "rollout.record=false", "trainer.steps=5"]
    train(tmp_path, *replay, recipe=recipe)
    (copy,) = tmp_path.iterdir()
    for one, two in zip(rows(copy), rows(run), strict=True):
        for key in ("loss/policy", "grad/norm", "reward/mean", "staleness/kl_k3", "sync/bytes"):
            assert one[key] == two[key], key


def test_a_loss_that_does_not_know_who_sampled_is_refused(recipe):
    values = yaml.safe_load(recipe.read_text())
    values["algorithm"]["old_policy"] = "learner"
    with pytest.raises(ValueError, match=r"rollout.ahead=1: .* set algorithm.old_policy: rollout"):
        Recipe.model_validate(values)
    values["algorithm"]["correction"] = {"ratio": "token", "action": "truncate", "high": 2.0}
    assert Recipe.model_validate(values).rollout.ahead == 1


@pytest.fixture(scope="module")
def stream(recipe, tmp_path_factory):
    """Three steps ahead, two leaders; some responses are longer than a step."""
    root = tmp_path_factory.mktemp("stream")
    settings = ["rollout.ahead=3", "rollout.max_new_tokens=100", "learner.tensor_parallel=1"]
    settings += ["rollout.prompts=8", "rollout.samples=4", "learner.global_batch_size=16"]
    train(root, *settings, "trainer.steps=6", "checkpoint.every=3", recipe=recipe)
    return root / "tiny"


def prompts(folder, steps):
    """Indices of the prompts that steps learnt, a group of samples each."""
    learnt = []
    for step in steps:
        files = sorted((folder / "rollouts").glob(f"step_{step:05}.leader_*.jsonl"))
        samples = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        groups = {(sample["group"], sample["prompt"]["index"]) for sample in samples}
        assert sorted(group for group, _ in groups) == list(range(8))
        learnt += [index for _, index in groups]
    return learnt


def test_no_token_is_older_than_the_bound_and_every_prompt_is_learnt_once(stream):
    recorded = rows(stream)
    assert max(row["staleness/versions_max"] for row in recorded) in (2, 3)
    assert all(row["mismatch/logprob_abs_mean"] < 5e-3 for row in (recorded[0], recorded[-1]))
    learnt = prompts(stream, range(6))
    assert len(set(learnt)) == len(learnt) == 48


def test_another_number_of_leaders_goes_on_with_the_prompts_in_flight(stream):
    copy = resume(stream, 3, "learner.tensor_parallel=2")
    learnt = prompts(stream, range(3)) + prompts(copy, range(3, 6))
    assert len(set(learnt)) == len(learnt) == 48
    assert max(row["staleness/versions_max"] for row in rows(copy)) <= 3
