"""One real FP16 server: keys, sampling, scoring, and both weight transports."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.models.spec import family_of, routing
from megatron_fp16rl.recipe import BuildModel, Model, Sync
from megatron_fp16rl.rollout import server as servers
from megatron_fp16rl.rollout.client import Client, Sampling, ServerError
from megatron_fp16rl.rollout.discovery import Endpoint
from megatron_fp16rl.rollout.server import Server, ServerDied, wait_until_healthy
from megatron_fp16rl.rollout.weight_sync.disk import DiskTransport
from megatron_fp16rl.utils import cache
from megatron_fp16rl.utils.processes import free_port, tail
from tests import models
from tests.conftest import DEAD_PROXY, run_ranks
from tests.ranks.test_replay import routers
from tests.runs import make_run, steps_of
from tests.workers.common import noisy

LONG = {"max_new_tokens": 60, "ignore_eos": True}
PROMPTS = [[2, 3, 12, 4, 5, 13], [9, 9, 12, 3, 2, 13]]


@pytest.fixture
def client(server, folder):
    """Of the server, which has the weights of the folder again."""
    client = Client(server.endpoint, timeout_s=60)
    client.post("/update_weights_from_disk", {"model_path": str(folder)}, admin=True)
    return client


@pytest.fixture(scope="module")
def folder():
    return model_folder(models.recipe().model)


@pytest.fixture(scope="module")
def other_weights(folder):
    """Weights that differ from those the server started with."""
    return dict(noisy(HFFolder(folder)))


def hugging_face(folder):
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    family_of(config).as_served(model)
    return model


def hugging_face_scores(folder, weights, sequences):
    """Log-probs of all tokens but the first, in fp32."""
    model = hugging_face(folder)
    if weights:
        model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        model.tie_weights()
    scores = []
    for ids in map(torch.tensor, sequences):
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        scores.append(logprobs.gather(1, ids[1:, None])[:, 0].tolist())
    return scores


def assert_close(scores, expected):
    for ours, theirs in zip(scores, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)


def assert_serves(client, folder, weights):
    assert_close(client.score(PROMPTS), hugging_face_scores(folder, weights, PROMPTS))


def test_no_proxy_stands_between_learner_and_server_or_a_server_and_itself(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, DEAD_PROXY)
    client = Client(server.endpoint, timeout_s=60)
    assert server.healthy
    server.freeze_garbage()
    assert client.responds
    assert len(client.generate(PROMPTS, Sampling(1))) == len(PROMPTS)
    # It was started with such a proxy, and asks itself something before it says that it is ready.
    deadline = time.monotonic() + 120
    while "ready to roll" not in (said := server.log.read_text()):
        assert time.monotonic() < deadline, tail(server.log)
        time.sleep(0.05)
    assert "ProxyError" not in said


def test_what_a_server_compiles_outlives_it(server, monkeypatch):
    environment = psutil.Process(server.process.pid).environ()
    for name, place in cache.kernel_caches().items():
        assert environment[name] == place
        assert Path(place).is_relative_to(cache.root())
    assert not cache.kernels().is_relative_to(server.scratch)
    assert environment["PATH"].startswith(f"{Path(sys.executable).parent}:")  # ninja is there
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert cache.kernel_caches()["TRITON_CACHE_DIR"] == "/elsewhere"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's servers only")
def test_a_servers_processes_are_forked_from_one_that_has_imported_sglang(server):
    """A spawned process would import it again, and bring a tracker of resources along."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert sorted(child.name() for child in children) == [
        "sglang::detokenizer",
        "sglang::scheduler",
    ]


def test_a_response_ends_with_the_first_stop_string_and_keeps_it(client, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = ("7", *(f"{digit}=" for digit in range(10)))
    answers = client.generate(PROMPTS * 60, Sampling(12, stop=stops))
    ends = dict.fromkeys(("one", "two", "end", "truncated"), 0)
    for answer in answers:
        assert len(answer.logprobs) == len(answer.ids)
        written = tokenizer.decode(answer.ids)  # special tokens too: they keep two others apart
        assert not any(stop in written[:-1] for stop in stops), answer
        if written.endswith(stops):
            assert not answer.truncated
            ends["one" if written.endswith("7") else "two"] += 1
        else:
            assert answer.truncated == (answer.ids[-1] != tokenizer.eos_token_id)
            ends["truncated" if answer.truncated else "end"] += 1
    assert all(ends.values()), ends


def test_grading_errors_are_counted_over_all_replicas(server, client, tmp_path):
    """Also where nothing is held out: training prompts verify the weights."""
    problems, function = tmp_path / "sums.jsonl", tmp_path / "mine.py"
    problems.write_text("".join(f'{{"problem": "{i}+1=", "answer": {i + 1}}}\n' for i in range(4)))
    function.write_text(
        "def score(prompt, response, answer):\n"
        "    if prompt == '3+1=':\n"
        "        raise ValueError('three')\n"
        "    return 1.0 + int(prompt[0])\n"
    )
    reward = {"kind": "function", "path": f"{function}:score", "workers": 1}
    recipe = models.recipe(
        task={
            "kind": "dataset",
            "path": str(problems),
            "held_out": 0.0,
            "reward": {**reward, "max_error_fraction": 0.9},
            "template": "none",
            "instruction": "",
        },
        rollout={
            "prompts": 4,
            "samples": 8,
            "max_new_tokens": 9,
            "stop": [*"0123456789"],
            "record": True,
        },
        learner={"ranks": 2, "global_batch_size": 8},
        trainer={"steps": 1},
    )
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(recipe.to_yaml())
    assert make_run(run, file, [], [server]) == ["", ""]
    (row,) = steps_of(run)
    lines = [f.read_text().splitlines() for f in sorted((run / "rollouts").iterdir())]
    assert [len(of_replica) for of_replica in lines] == [16, 16]
    samples = [json.loads(line) for of_replica in lines for line in of_replica]
    assert [sample["group"] for sample in samples] == [i // 8 for i in range(32)]
    assert all(sample["reward"] == 0 for sample in samples if sample["truncated"])
    graded = [sample for sample in samples if not sample["truncated"]]
    by_group = [{s["reward"] for s in graded if s["group"] == group} for group in range(4)]
    assert sorted(map(tuple, by_group)) == [(0.0,), (1.0,), (2.0,), (3.0,)]
    failed = sum(not sample["reward"] for sample in graded)
    assert failed >= 4
    assert (row["reward/errors"], row["reward/timeouts"], row["rollout/servers"]) == (failed, 0, 1)
    assert row["sync/verified_logprob_abs_mean"] < 0.02
    assert row["eval/accuracy"] is None
    strict = ["task.reward.max_error_fraction=0"]
    for error in make_run(tmp_path / "strict", file, strict, [server]):
        assert "ValueError: three" in error
        assert "mine.py:3" in error


def test_sampling_gives_one_answer_a_prompt_with_its_log_probs(client, folder):
    prompts = PROMPTS * 20
    answers = client.generate(prompts, Sampling(5))
    assert len(answers) == len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert 1 <= len(answer.ids) == len(answer.logprobs) <= 5
        assert answer.truncated == (answer.ids[-1] != 1)  # 1 ends a sequence
        assert answer.text == "".join("_$0123456789+="[i] for i in answer.ids if i > 1)
        rescored = client.score([prompt + answer.ids])[0][len(prompt) - 1 :]
        assert answer.logprobs == pytest.approx(rescored, abs=0.02)
    # At another temperature the sampled log-probs are those of the scaled logits.
    (answer,) = client.generate(PROMPTS[:1], Sampling(1, temperature=0.5))
    with torch.no_grad():
        logits = hugging_face(folder)(torch.tensor(PROMPTS[:1])).logits[0, -1]
    expected = (logits / 0.5).log_softmax(-1)[answer.ids[0]].item()
    assert answer.logprobs[0] == pytest.approx(expected, abs=0.02)


def test_disk_sync(client, folder, other_weights, tmp_path):
    assert_serves(client, folder, None)
    disk = DiskTransport(Sync(), folder, tmp_path / "scratch", "fp16")
    assert disk.send(iter(other_weights.items()), "11", [client]) > sum(
        t.nbytes for t in other_weights.values()
    )
    assert_serves(client, folder, other_weights)
    assert client.generate(PROMPTS, Sampling(2))[0].version == "11"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_server_is_idle_when_its_responses_have_ended(client):
    def until_busy(answers):
        while not answers.done():
            client.wait_until_idle(0.01)

    with ThreadPoolExecutor() as threads:
        body = {"input_ids": PROMPTS * 400, "sampling_params": LONG}
        answers = threads.submit(client.post, "/generate", body)
        with pytest.raises(ServerError, match="Timed out waiting for idle state"):
            until_busy(answers)
        client.wait_until_idle(60)
        assert len(answers.result(timeout=5)) == 800


def test_refusals_and_silence_are_errors_with_reasons(client):
    with pytest.raises(ServerError, match=r"/generate answered 400"):
        client.post("/generate", {"input_ids": "nonsense", "sampling_params": {"top_p": 7}})
    with pytest.raises(ServerError, match=r"/no_such_path answered 404"):
        client.post("/no_such_path", {})
    with pytest.raises(ServerError, match=r"/generate: ReadTimeout"):
        client.post(
            "/generate", {"input_ids": PROMPTS * 400, "sampling_params": LONG}, timeout_s=0.2
        )
    nobody = Client(Endpoint(f"http://127.0.0.1:{free_port('127.0.0.1')}", "a", "b"), 5)
    with pytest.raises(ServerError, match="ConnectError"):
        nobody.score(PROMPTS)


def test_a_server_that_ends_or_is_late_is_reported_with_its_log(server, tmp_path):
    log = tmp_path / "server.log"
    with log.open("w") as output:
        code = "import sys; print('no such model: xyz'); sys.exit(3)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=output)
    process.wait()
    with pytest.raises(ServerDied, match=r"(?s)ended with code 3.*no such model: xyz"):
        wait_until_healthy([Server(server.endpoint, process, log, tmp_path)], 5, lambda line: None)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    silent = Endpoint(f"http://127.0.0.1:{free_port('127.0.0.1')}", "a", "b")
    try:
        with pytest.raises(ServerDied, match=r"did not answer /health in 1 s"):
            wait_until_healthy([Server(silent, sleeper, log, tmp_path)], 1, lambda line: None)
    finally:
        sleeper.kill()


@pytest.mark.parametrize(("config", "ranks"), models.SERVED.values(), ids=models.SERVED)
def test_a_model_is_served_as_it_is_learnt(config, ranks, tmp_path):
    build = BuildModel(config=config, alphabet=models.ALPHABET)
    served, learnt = tmp_path / "served", tmp_path / "learnt"
    shutil.copytree(model_folder(Model(build=build)), served)
    if config["model_type"] == "deepseek_v3":
        models.edit_json(served / "config.json", model_type="kimi_k2")
    lively = {**config, "initializer_range": 0.2}
    models.hf_model(lively, learnt, vocabulary=len(models.ALPHABET) + 2)
    wanted = servers.ServerConfig("fp16", tensor_parallel=ranks, router_replay=True)
    started = servers.start(wanted, served, tmp_path, tmp_path, 0)
    try:
        servers.wait_until_healthy([started], 300, lambda line: None)
        counters = servers._counters(started.process.pid)
        assert all(file.exists() for file in counters)
        client = Client(started.endpoint, 60)
        before = client.score(PROMPTS)
        assert_close(before, hugging_face_scores(served, None, PROMPTS))
        learner, _ = run_ranks(
            2,
            "servers.serve_learnt",
            endpoint=asdict(started.endpoint),
            folder=str(learnt),
            ranks_per_server=ranks,
            layout={"expert_parallel": 2},
            sequences=PROMPTS,
        )
        ours = learner["scores"]
        # Each parameter is what SGLang's own loader of full tensors makes of them.
        by_slices, by_full_tensors = learner["checksums"]
        assert by_slices == by_full_tensors
        sliced, full = learner["sent"]
        assert sliced / ranks <= (0.55 if ranks == 2 else 1) * full
        assert_close(client.score(PROMPTS), ours)
        assert_close(ours, hugging_face_scores(learnt, None, PROMPTS))
        assert abs(np.subtract(ours, before)).max() > 1  # the update made a difference
        answers = client.generate(PROMPTS, Sampling(40), routing=routing(load_config(learnt)))
        assert {answer.version for answer in answers} == {"31"}
        assert_decoded(learnt, answers)
        assert agreement(learnt, answers) > 0.95
    finally:
        servers.stop_servers([started])
    assert len(counters) == 1
    assert not any(file.exists() for file in counters)


def assert_decoded(folder, answers):
    """Log-probs of sampled tokens are Hugging Face's, but for tokens whose experts are a toss-up."""
    sequences = [[*prompt, *answer.ids] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    scores = hugging_face_scores(folder, None, sequences)
    apart = [
        np.subtract(row[-len(answer.ids) :], answer.logprobs)
        for row, answer in zip(scores, answers, strict=True)
    ]
    assert np.median(np.abs(np.concatenate(apart))) < 0.02


def agreement(folder, answers):
    """How many of the experts that a server reports Hugging Face chooses as well."""
    model = hugging_face(folder)
    sequences = [[*prompt, *answer.ids] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    with routers(model, sequences) as reference, torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    same = []
    for row, answer in enumerate(answers):
        told = torch.as_tensor(answer.experts).long()  # [tokens, layers, top_k]
        chosen = reference[row, : len(told)]
        known = chosen[..., :1] >= 0  # layers with experts
        same.append(((told[..., :, None] == chosen[..., None, :]).any(-1))[known.expand_as(told)])
    return torch.cat(same).float().mean().item()
