"""`rollout.ahead` on a real server: which weights sampled what, and resumes with what is in hand and in flight."""

import json
import threading
import time
from concurrent.futures import Future

import pytest
import torch
from transformers import AutoTokenizer

from megatron_fp16rl.data.tasks import make
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.recipe import Sync
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.collector import Collector
from megatron_fp16rl.rollout.pool import Pool
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.rollout.stream import Stream, stopped
from megatron_fp16rl.rollout.weight_sync.disk import DiskTransport
from tests import models
from tests.e2e.test_server import hugging_face_scores
from tests.runs import go_on, learnt, make_run, steps_of
from tests.workers.common import noisy

# One token in a hundred ends a response of a random model of so many.
MODEL = {
    "build": {
        "config": models.QWEN3,
        "alphabet": models.ALPHABET + "".join(map(chr, range(192, 280))),
    }
}
REWARD = """
def score(prompt: str, response: str, answer: str) -> float:
    return sum(map(str.isascii, response)) / max(1, len(response))
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
        model=MODEL,
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
            "stop": [*"0123456789"],  # what is truncated earns nothing
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
def server(tmp_path_factory):
    """One that heeds seeds, for all runs here."""
    config = ServerConfig("fp16", deterministic=True, start_timeout_s=300)
    folder = model_folder(models.recipe(model=MODEL).model)
    with launch_servers(config, folder, tmp_path_factory.mktemp("logs")) as (started,):
        yield started


@pytest.fixture(scope="module")
def run(recipe, server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert make_run(folder, recipe, [], [server]) == ["", ""]
    return folder


def test_every_batch_is_of_the_weights_before_and_says_so(run):
    recorded = steps_of(run)
    assert [row["staleness/versions_mean"] for row in recorded] == [0, 1, 1, 1, 1]
    assert [row["sync/version"] for row in recorded] == [1, 2, 3, 4, 5]
    for row in recorded:
        # No pass of its own: neither loss nor metric needs it.
        assert row["time/score_s"] < row["time/update_s"]
        assert row["grad/norm"] > 0
        file = run / "rollouts" / f"step_{row['step']:05}.leader_0.jsonl"
        versions = {json.loads(line)["version"] for line in file.read_text().splitlines()}
        assert versions == {max(0, row["step"] - 1)}
    # Step 0 is on policy: what its update saw is what servers and learner round differently.
    assert recorded[0]["staleness/logprob_abs_mean"] < 5e-3
    assert all(row["staleness/logprob_abs_mean"] > 0.01 for row in recorded[1:])
    # Rounding alone, where the servers scored sequences again: at the first step, and at the last.
    assert ["mismatch/logprob_abs_mean" in row for row in recorded] == [True, *[False] * 3, True]
    assert all(0 < recorded[i]["mismatch/logprob_abs_mean"] < 5e-3 for i in (0, 4))


def test_a_resumed_run_takes_the_batch_in_hand_and_goes_on_to_the_last_bit(run, recipe, tmp_path):
    batch = sorted(path.name for path in (run / "checkpoints/step_2/rollouts").iterdir())
    assert batch == ["metrics.json", "step_00002.leader_0.jsonl"]
    assert not (run / "checkpoints/step_5/rollouts").exists()
    assert go_on(run, 2, tmp_path / "run", recipe, []) == ["", ""]
    assert learnt(tmp_path / "run") == learnt(run)


def test_another_layout_takes_the_batch_in_hand_too(run, recipe, tmp_path):
    """Two data-parallel ranks in place of two tensor-parallel ones: each takes its share of the prompts."""
    copy = tmp_path / "run"
    assert go_on(run, 4, copy, recipe, ["learner.tensor_parallel=1"]) == ["", ""]
    one, two = steps_of(copy)[-1], steps_of(run)[-1]
    for key in ("batch/prompts_digest", "reward/mean", "staleness/versions_mean", "tokens/step"):
        assert one[key] == pytest.approx(two[key]), key
    assert one["staleness/logprob_abs_mean"] == pytest.approx(
        two["staleness/logprob_abs_mean"], rel=0.05
    )


def test_recorded_batches_are_learnt_to_the_same_bits(run, recipe, tmp_path):
    settings = [f"rollout.replay={run}/rollouts", "rollout.record=false"]
    assert make_run(tmp_path, recipe, settings) == ["", ""]
    for one, two in zip(steps_of(tmp_path), steps_of(run), strict=True):
        for key in ("loss/policy", "grad/norm", "reward/mean", "staleness/kl_k3"):
            assert one[key] == two[key], key


STREAM = [
    *("rollout.ahead=3", "rollout.max_new_tokens=60", "rollout.stop=[]"),
    *("trainer.steps=6", "checkpoint.every=3"),
]


@pytest.fixture(scope="module")
def streamed(recipe, server, tmp_path_factory):
    """Three steps ahead, two leaders; some responses are longer than a step."""
    folder = tmp_path_factory.mktemp("streamed") / "run"
    settings = [*STREAM, "learner.tensor_parallel=1"]
    assert make_run(folder, recipe, settings, [server]) == ["", ""]
    return folder


def prompts(folder, steps):
    """Indices of the prompts that steps learnt, a group of samples each."""
    indices = []
    for step in steps:
        files = sorted((folder / "rollouts").glob(f"step_{step:05}.leader_*.jsonl"))
        samples = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        groups = {(sample["group"], sample["prompt"]["index"]) for sample in samples}
        assert sorted(group for group, _ in groups) == list(range(8))
        indices += [index for _, index in groups]
    return indices


def test_no_token_is_older_than_the_bound_and_every_prompt_is_learnt_once(streamed):
    recorded = steps_of(streamed)
    assert all(row["grad/norm"] > 0 for row in recorded)
    assert max(row["staleness/versions_max"] for row in recorded) in (2, 3)
    assert all(row["mismatch/logprob_abs_mean"] < 5e-3 for row in (recorded[0], recorded[-1]))
    indices = prompts(streamed, range(6))
    assert len(set(indices)) == len(indices) == 48


def test_another_number_of_leaders_goes_on_with_the_prompts_in_flight(streamed, recipe, tmp_path):
    copy = tmp_path / "run"
    assert go_on(streamed, 3, copy, recipe, STREAM) == ["", ""]
    indices = prompts(streamed, range(3)) + prompts(copy, range(3, 6))
    assert len(set(indices)) == len(indices) == 48
    assert max(row["staleness/versions_max"] for row in steps_of(copy)) <= 3


# Two prompts a step, sixteen in flight: when the first two are complete the others are cut.
CUT = {"prompts": 2, "samples": 2, "max_new_tokens": 110, "ahead": 8, "deterministic": True}
FEW = models.recipe(
    model=MODEL,
    rollout=CUT,
    algorithm={"old_policy": "rollout"},
    learner={"global_batch_size": 4},
)


@pytest.fixture(scope="module")
def publish(server, tmp_path_factory):
    """Sends the weights of the model's folder, or others, under a version."""
    folder = model_folder(FEW.model)
    other = dict(noisy(HFFolder(folder)))
    original = {name: HFFolder(folder).read(name) for name in HFFolder(folder).names()}
    disk = DiskTransport(Sync(), folder, tmp_path_factory.mktemp("disk") / "scratch", "fp16")

    def send(version, weights=original):
        disk.send(iter(weights.items()), str(version), [Client(server.endpoint, 60)])

    send.other, send.original, send.folder = other, original, folder
    return send


def collector(server, folder):
    pool = Pool(300)
    pool.set_servers([server.endpoint])
    task = make(FEW.task, AutoTokenizer.from_pretrained(folder), seed=0)
    return Collector(FEW.rollout, task, pool, 0)


def stream_of(server, folder, steps):
    stream = Stream(collector(server, folder), steps)
    for _ in range(FEW.rollout.ahead):  # as if the learner had waited so often
        stream.adapt(0)
    return stream


def test_a_cut_response_goes_on_as_if_it_had_not_been_cut(server, publish):
    """Under equal weights, with the seeds of steps that were sampled in one go."""
    publish(0)
    in_one_go = collector(server, publish.folder)
    whole = [sample for step in range(8) for sample in in_one_go.collect(step, {0}).samples]
    for _ in range(3):  # a machine that stands still for a second cuts none: all have ended
        stream, samples = stream_of(server, publish.folder, 8), []
        for step in range(8):
            publish(step)
            samples += stream.collect(step, step, step + 1, stopped()).samples
        assert len(samples) == len(whole) == 32
        cut = sum(len(set(sample.version)) > 1 for sample in samples)
        if cut >= 5:
            break
    ours = {(sample.prompt.text, *sample.ids): sample for sample in samples}
    same = [ours.get((sample.prompt.text, *sample.ids)) for sample in whole]
    assert cut >= 5
    # A token that rounding decides may differ, and all after it.
    assert sum(sample is not None for sample in same) >= len(whole) - 2


def test_each_token_has_the_log_prob_of_the_weights_that_sampled_it(server, publish):
    """Even versions are the model's weights, odd ones others."""
    stream, samples = stream_of(server, publish.folder, 20), []
    for step in range(10):
        publish(step, publish.other if step % 2 else publish.original)
        samples += stream.collect(step, step, step + 1, stopped()).samples
    cut = [sample for sample in samples if len({version % 2 for version in sample.version}) == 2]
    assert len(cut) >= 5
    sequences = [sample.prompt.ids + sample.ids for sample in cut]
    scores = [
        hugging_face_scores(publish.folder, weights, sequences) for weights in (None, publish.other)
    ]
    own, others = [], []
    for i, sample in enumerate(cut):
        start = len(sample.prompt.ids) - 1
        for t, (version, logprob) in enumerate(zip(sample.version, sample.logprobs, strict=True)):
            own.append(logprob - scores[version % 2][i][start + t])
            others.append(logprob - scores[1 - version % 2][i][start + t])
    assert torch.tensor(own).abs().max() < 0.02
    assert torch.tensor(others).abs().mean() > 0.1


def test_it_samples_until_it_is_stopped(server, publish):
    """As many prompts as it may be ahead, while a learner learns."""
    publish(1)
    stream, stop, results = stream_of(server, publish.folder, 10), Future(), []
    thread = threading.Thread(target=lambda: results.append(stream.collect(0, 1, 2, stop)))
    thread.start()
    deadline = time.monotonic() + 120
    while len(stream._complete) < 16:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert thread.is_alive()
    stop.set_result(None)
    thread.join(60)
    assert len(results[0].samples) == 4
    assert not stream._begun
    assert len(stream._complete) == 14
