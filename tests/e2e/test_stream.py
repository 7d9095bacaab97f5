"""`rollout.ahead` above 1 on real servers: each token of a cut response is of the weights that sampled it."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch
from transformers import AutoTokenizer

from megatron_fp16rl.data.tasks import make
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.recipe import Rollout, Sync
from megatron_fp16rl.rollout import server as servers
from megatron_fp16rl.rollout.client import Client
from megatron_fp16rl.rollout.collector import Collector
from megatron_fp16rl.rollout.pool import Pool
from megatron_fp16rl.rollout.stream import Stream, stopped
from megatron_fp16rl.rollout.weight_sync.disk import DiskTransport
from tests import models
from tests.e2e.test_server import hugging_face_scores
from tests.workers.common import noisy

# Two prompts a step, sixteen in flight: when the first two are complete the others are cut. One token in a
# hundred ends a response of a random model of so many.
SETTINGS = Rollout(prompts=2, samples=2, max_new_tokens=110, ahead=8, deterministic=True)
MODEL = {
    "build": {
        "config": models.QWEN3,
        "alphabet": models.ALPHABET + "".join(map(chr, range(192, 280))),
    }
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One that heeds seeds."""
    folder = tmp_path_factory.mktemp("server")
    recipe = models.recipe(
        model=MODEL,
        rollout=SETTINGS.model_dump(),
        algorithm={"old_policy": "rollout"},
        learner={"global_batch_size": 4},
    )
    model = model_folder(recipe.model)
    started = servers.start(servers.ServerConfig.of(recipe), model, folder, folder, 0)
    try:
        servers.wait_until_healthy([started], 300, lambda line: None)
        yield started
    finally:
        servers.stop_servers([started])


@pytest.fixture
def publish(server, tmp_path):
    """Sends the weights of the model's folder, or others, under a version."""
    folder = model_folder(models.recipe(model=MODEL).model)
    other = dict(noisy(HFFolder(folder)))
    original = {name: HFFolder(folder).read(name) for name in HFFolder(folder).names()}
    disk = DiskTransport(Sync(), folder, tmp_path / "scratch", "fp16")

    def send(version, weights=original):
        disk.send(iter(weights.items()), str(version), [Client(server.endpoint, 60)])

    send.other, send.original, send.folder = other, original, folder
    yield send
    send(0)


def collector(server, folder):
    pool = Pool(300)
    pool.set_servers([server.endpoint])
    task = make(models.recipe().task, AutoTokenizer.from_pretrained(folder), seed=0)
    return Collector(SETTINGS, task, pool, 0)


def stream_of(server, folder, steps):
    stream = Stream(collector(server, folder), steps)
    for _ in range(SETTINGS.ahead):  # as if the learner had waited so often
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
