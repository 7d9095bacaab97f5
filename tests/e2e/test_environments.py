"""The example of docs/environments.md with real engines: two leaders, several turns, evaluated."""

import json

import pytest
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from tests import environment_page
from tests.conftest import python

SETTINGS = [
    "learner.tensor_parallel=1",  # two data-parallel ranks
    "rollout.sglang={disable_radix_cache: false}",
    "rollout.record=true",
    "rollout.refill_rounds=1",
    "warm_start={accuracy: 0.0, noise: 0.1, check_every: 40}",
    "trainer.suites=[{suite: 'training:avg@2'}]",
    "checkpoint.every=2",
    "gates=[]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dice")
    recipe = environment_page.write(folder)
    command = ["-m", "megatron_fp16rl.cli", "train", recipe, f"--set=trainer.run_root={folder}"]
    command += [f"--set={one}" for one in SETTINGS]
    python(*command, "--set=trainer.steps=3", timeout=400)
    return folder / "dice"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def samples(folder):
    files = sorted((folder / "rollouts").glob("step_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def dice(target, turns):
    """What the game says to turns of the model, the last of which ends it, and the reward."""
    total, said = 0, []
    for turn in turns:
        if turn not in ("1+", "2+", "3+"):
            return said, 0.0
        total += int(turn[0])
        if total >= target or len(said) + 1 == 4:
            return said, float(total == target)
        said.append(f"{total}=")
    raise AssertionError("the game has not ended")


def test_every_sample_is_a_game_as_it_is_played(run):
    """Its rules written once more; what the environment said has no log-prob, and the model's tokens all have."""
    played = samples(run)
    assert len(played) == 3 * 4 * 8
    several = 0
    for sample in played:
        mask = sample["mask"] or [True] * len(sample["ids"])
        assert len(mask) == len(sample["ids"]) == len(sample["logprobs"]) == len(sample["version"])
        assert [lp != 0 for lp in sample["logprobs"]] == mask
        if sample["truncated"]:
            assert sample["reward"] == 0
            continue
        # A turn is what lies between the environment's words; the tokenizer has one for each character.
        pieces = [[]]
        for token, own in zip(sample["ids"], mask, strict=True):
            if pieces[-1] and own != pieces[-1][-1][1]:
                pieces.append([])
            pieces[-1].append((token, own))
        text, turns, said = sample["text"], [], []
        for i, piece in enumerate(pieces):
            # The end token, the last of a turn that gave up, has no text.
            size = len(piece) if i < len(pieces) - 1 else len(text)
            (said if i % 2 else turns).append(text[:size])
            text = text[size:]
        assert (said, sample["reward"]) == dice(int(sample["prompt"]["answer"]), turns)
        several += len(turns) > 1
    assert several > 20


def test_the_learner_scores_the_turns_as_the_servers_sampled_them(run):
    """Of tokens that were not the server's own, or had others before them, the log-probs would be apart."""
    for row in rows(run):
        assert row["mismatch/logprob_abs_mean"] < 5e-3
        assert row["rollout/turns"] > 32
        # A later turn sends the tokens so far; all but those since the last one were there.
        assert 0.2 < row["rollout/cached_tokens_share"] < 1


def test_games_are_evaluated_in_and_after_training(run, tmp_path):
    last = rows(run)[-1]
    assert 0 <= last["eval/training/avg@2"] <= 1
    command = ["eval", run, "--out", tmp_path, "--json", "--suite=training:avg@8"]
    done = CliRunner().invoke(app, list(map(str, command)))
    (row,) = json.loads(done.stdout)["rows"]
    assert row["responses"] == 6 * 8
    assert row["value"] == pytest.approx(last["eval/training/avg@2"], abs=0.4)
