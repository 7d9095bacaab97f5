"""The example of docs/environments.md with real engines: two leaders, several turns, evaluated."""

import json

import pytest

from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import Suite, load
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.evaluation import Questions, measure, respond
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from tests import environment_page
from tests.runs import make_run, steps_of

SETTINGS = [
    "learner.tensor_parallel=1",  # two data-parallel ranks
    "rollout.sglang={disable_radix_cache: false}",
    "rollout.record=true",
    "rollout.refill_rounds=1",
    "warm_start={accuracy: 0.0, noise: 0.1, check_every: 40}",
    "trainer.suites=[{suite: 'training:avg@2'}]",
    "trainer.steps=3",
    "checkpoint.every=2",
    "gates=[]",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return environment_page.write(tmp_path_factory.mktemp("dice"))


@pytest.fixture(scope="module")
def server(recipe, tmp_path_factory):
    wanted = load(recipe, SETTINGS)
    config, model = ServerConfig.of(wanted), model_folder(wanted.model)
    with launch_servers(config, model, tmp_path_factory.mktemp("logs")) as (started,):
        yield started


@pytest.fixture(scope="module")
def run(recipe, server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dice"
    assert make_run(folder, recipe, SETTINGS, [server]) == ["", ""]
    return folder


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
    for row in steps_of(run):
        assert row["mismatch/logprob_abs_mean"] < 5e-3
        assert row["rollout/turns"] > 32
        # A later turn sends the tokens so far; all but those since the last one were there.
        assert 0.2 < row["rollout/cached_tokens_share"] < 1


def test_games_are_evaluated_in_training_and_by_a_client_alone(run, recipe, server):
    wanted = load(recipe, SETTINGS)
    tokenizer = load_tokenizer(model_folder(wanted.model))
    questions = Questions.of(Suite(suite="training:avg@8"), wanted, tokenizer, 0)
    rows, _ = respond([Client(server.endpoint, 60)], questions)
    assert len(rows) == 6 * 8
    value = steps_of(run)[-1]["eval/training/avg@2"]
    assert measure(questions.suite, rows)["value"] == pytest.approx(value, abs=0.4)
