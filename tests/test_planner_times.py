"""Arithmetic of models against transformers and torch; the time model against simpler reckoning."""

import dataclasses
import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fp16rl.planner import fit
from megatron_fp16rl.planner.arithmetic import costs
from megatron_fp16rl.planner.decoding import (
    Lengths,
    Servers,
    decode_step,
    response_lengths,
    rollout,
)
from megatron_fp16rl.planner.gpus import GPUS
from megatron_fp16rl.planner.rates import SHIPPED, Efficiencies
from megatron_fp16rl.planner.search import suggest
from megatron_fp16rl.planner.times import Step, Team, estimate, learner, micro_batches, publish
from megatron_fp16rl.recipe import RecipeError, load
from tests import models

ALL = {**models.FAMILIES, **models.MOE_FAMILIES}
H100 = GPUS["h100-80gb"]
LLAMA = {**models.FAMILIES["llama"], "vocab_size": 1000}


def config(values: dict) -> object:
    return AutoConfig.for_model(**{"vocab_size": 97, **values})


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_flops_are_those_of_transformers_and_torch(name):
    wanted, seq = config(ALL[name]), 24
    options = {"experts_implementation": "batched_mm"} if name in models.MOE_FAMILIES else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(wanted, attn_implementation="eager", **options)
        tokens = torch.zeros(2, seq, dtype=torch.long)
    counted = costs(wanted)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(tokens)
    # Eager attention multiplies what the mask hides, too.
    assert flops.get_total_flops() == 2 * counted.forward_flops(seq, causal=False)


@pytest.mark.parametrize(
    ("name", "total", "active"),  # 1e9, as their makers publish them
    [
        ("Qwen3-30B-A3B", 30.5, 3.3),
        ("Qwen3-235B-A22B", 235, 22),
        ("DeepSeek-V3", 671, 37),
        ("Llama-3.1-8B", 8.03, 8.03),
        ("Qwen3-32B", 32.8, 32.8),
    ],
)
def test_published_sizes(name, total, active):
    counted = fit.model(name)
    assert counted.parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert counted.active / 1e9 == pytest.approx(active, rel=0.03)


def test_distinct_experts_are_those_of_random_choices():
    counted = costs(config(models.QWEN3_MOE))  # 2 of 8
    pairs = list(itertools.combinations(range(8), 2))
    chosen = [len({*a, *b, *c}) for a, b, c in itertools.product(pairs, repeat=3)]
    assert counted.distinct_experts(3) == pytest.approx(sum(chosen) / len(chosen))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 1.0])
def test_lengths_have_their_mean_and_their_tail(share):
    most, count = 8000, 4000
    lengths = response_lengths(share * most, most, count)
    assert sum(lengths) / count == pytest.approx(share * most, rel=0.01)
    assert lengths == sorted(lengths)
    assert lengths[-1] == most
    if share == 0.5:  # the root of x (1 - exp(-1 / x)) = 1/2 is 0.6275: a fifth is cut
        assert lengths.count(most) / count == pytest.approx(math.exp(-1 / 0.6275), abs=0.01)


@pytest.mark.parametrize(
    ("room", "under_way", "jobs"), [(1000, 1, 1), (10, 1, 1), (1000, 3, 4), (7, 3, 4)]
)
def test_a_servers_batch_over_time(room, under_way, jobs):
    """Against a walk token by token."""
    model, prompt, count = costs(config(models.QWEN3_MOE)), 10, 32
    lengths = Lengths(prompt, 20, 50)
    cache = int(room * (prompt + lengths.mean))
    servers = Servers(2, 1, cache, 4096, 512, under_way, jobs)
    found = rollout(model, servers, lengths, 2 * count, 8, 2, H100, SHIPPED)

    ends = response_lengths(20, 50, count)
    random.Random(0).shuffle(ends)
    size = -(-count // jobs)
    pieces = [ends[i : i + size] for i in range(0, count, size)]
    left = [len(piece) for piece in pieces]
    waiting = [(job, end) for job in range(under_way) for end in pieces[job]]
    coming = list(range(under_way, jobs))
    running, seconds = [], 0.0
    while waiting or running:
        while waiting and len(running) < room:
            job, end = waiting.pop(0)
            running.append([job, end, 0])
        tokens = sum(prompt + made for _, _, made in running)
        seconds += decode_step(model, servers, len(running), tokens, 2, H100, SHIPPED)
        for sequence in running:
            sequence[2] += 1
        for job, _, _ in [s for s in running if s[2] == s[1]]:
            left[job] -= 1
            if not left[job] and coming:
                following = coming.pop(0)
                waiting += [(following, end) for end in pieces[following]]
        running = [s for s in running if s[2] < s[1]]
    assert found.decode_s == pytest.approx(seconds, rel=1e-3)
    assert found.queued == (room < count)
    assert 0 < found.tail_s < found.decode_s


def test_micro_batches_are_those_of_the_learner():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_fp16rl.learner import Learner

    model, step = costs(config(LLAMA)), Step(64, 8, Lengths(10, 40, 100))
    team = Team(ranks=1, micro_batch_tokens=220)
    lengths = torch.tensor([10 + n for n in response_lengths(40, 100, 64)])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        one = SimpleNamespace(
            settings=SimpleNamespace(micro_batch_tokens=220),
            world=SimpleNamespace(device="cpu", data=SimpleNamespace(group=None)),
            model=SimpleNamespace(chunks=[None]),
        )
        batch = SimpleNamespace(lengths=lengths, tokens=lengths)
        parts = Learner._micro_batches(one, batch)
    finally:
        dist.destroy_process_group()
    real = [(len(part), int(lengths[part].max())) for part in parts]
    assert micro_batches(model, team, step, 64) == real


def test_a_dense_learner_on_one_gpu_is_flops_over_speed():
    model = costs(config(LLAMA))
    step = Step(8, 2, Lengths(20, 100, 100), updates=2, scorings=2)  # all as long as the limit
    rates = Efficiencies(gemm=0.5, memory=0.5, network=0.5, launch_s=1.0)
    found = learner(model, Team(1, micro_batch_tokens=240), step, H100, rates)
    forward = 8 * model.forward_flops(120) / (989e12 * 0.5)
    assert found["score"] == pytest.approx(2 * forward)
    assert found["update_compute"] == pytest.approx(3 * forward)
    again = learner(model, Team(1, micro_batch_tokens=240, recompute=True), step, H100, rates)
    assert again["update_compute"] == pytest.approx(4 * forward)
    optimizer = 2 * 38 * model.parameters / (3350e9 * 0.5)
    assert found["update"] == pytest.approx(3 * forward + optimizer)


def test_pipelines_wait_and_replicas_share():
    model = costs(config({**LLAMA, "num_hidden_layers": 8, "vocab_size": 16}))
    step = Step(64, 8, Lengths(20, 100, 100))
    of = {
        name: learner(model, Team(micro_batch_tokens=120, **team), step, H100, SHIPPED)
        for name, team in {
            "one": {"ranks": 1},
            "piped": {"ranks": 4, "pipeline_parallel": 4},
            "chunked": {"ranks": 4, "pipeline_parallel": 4, "model_chunks": 2},
            "replicated": {"ranks": 4},
        }.items()
    }
    piped, chunked = of["piped"], of["chunked"]
    # (PP - 1) / m of the work with 64 micro-batches, half of it with two chunks
    assert piped["update_bubble"] == pytest.approx(piped["update_compute"] * 3 / 64)
    assert chunked["update_bubble"] == pytest.approx(piped["update_bubble"] / 2)
    assert of["replicated"]["score"] == pytest.approx(of["one"]["score"] / 4)
    assert of["one"]["update_data_parallel"] == 0
    assert of["replicated"]["update_data_parallel"] > 0


def test_sync_is_two_hops_of_all_bytes():
    model = fit.model("Llama-3.1-8B")
    rates = dataclasses.replace(SHIPPED, network=1.0)
    size = 2 * model.parameters
    tensors = 32 * 9 * 1e-4
    alone = publish(model, Team(8), True, 2, H100, rates)  # each rank has the whole model
    assert alone == pytest.approx(size / 50e9 + tensors)
    spread = publish(model, Team(32, pipeline_parallel=16), True, 2, H100, rates)
    assert spread == pytest.approx(size / 50e9 + size / 2 * (1 / 50e9 + 1 / 450e9) + tensors)


def test_an_estimate_adds_up():
    recipe = models.recipe(
        rollout={"prompts": 16, "samples": 8, "max_new_tokens": 2000, "servers": 2},
        learner={"global_batch_size": 32, "ranks": 4, "distributed_optimizer": True},
        algorithm={"kl": {"coefficient": 0.1}},
    )
    model = config({**LLAMA, "max_position_embeddings": 4096})
    found = estimate(recipe, model, H100)
    parts = (found.rollout_s, found.score_s, found.update_s, found.sync_s)
    assert min(parts) > 0
    assert found.step_s == pytest.approx(sum(parts))
    overlapped = max(found.rollout_s, found.score_s + found.update_s) + found.sync_s
    assert found.one_step_off_s == pytest.approx(overlapped)
    # 128 sequences of a 6-token sum and 1,000 tokens on average, on 6 GPUs
    assert found.tokens_per_s_per_gpu == pytest.approx(128 * 1006 / found.step_s / 6)
    shorter = estimate(recipe, model, H100, mean_tokens=100)
    assert shorter.rollout_s < found.rollout_s
    assert shorter.update_s < found.update_s


def test_what_ships_is_what_the_fit_gives_and_the_docs_show():
    fitted = fit.fit(fit.ROWS)
    for field in dataclasses.fields(Efficiencies):
        ours, found = getattr(SHIPPED, field.name), getattr(fitted, field.name)
        assert ours == pytest.approx(found, rel=0.02), f"{field.name}: run planner.fit --write"
    page = Path(__file__).parents[1] / "docs/planner.md"
    assert fit.between(page.read_text()) == fit.tables(), "run planner.fit --write"


FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
LARGE = {  # Llama 3.1 8B on one node of learners: too large without the distributed optimizer
    "rollout": {"prompts": 64, "samples": 8, "max_new_tokens": 4090, "servers": 8},
    "learner": {
        "global_batch_size": 512,
        "ranks": 8,
        "micro_batch_tokens": 16384,
        "megatron": FULL,
    },
    "slurm": {"learner_nodes": 1, "rollout_nodes": 1},
}
SHARDED = {**LARGE["learner"], "distributed_optimizer": True}


def llama(layers: int = 32) -> object:
    return config(
        {
            **fit._MODELS["Llama-3.1-8B"],
            "num_hidden_layers": layers,
            "max_position_embeddings": 8192,
        }
    )


def found(test, model=None, **changes):
    """The suggestions for LARGE with some sections changed; `fits` is asked 20 times at most."""
    calls = []

    def fits(recipe) -> bool:
        calls.append(recipe)
        return test(recipe)

    recipe = models.recipe(**{**LARGE, **changes})
    suggestions = suggest(recipe, model or llama(), H100, fits)
    assert len(calls) <= 20
    return suggestions


def test_one_change_is_suggested_where_it_is_enough():
    (one,) = found(lambda recipe: recipe.learner.distributed_optimizer)
    assert one.changes == {"learner.distributed_optimizer": True}
    assert one.nodes == 2
    (full,) = found(
        lambda recipe: recipe.learner.megatron.get("recompute_granularity") == "full",
        learner={**SHARDED, "megatron": {}, "micro_batch_tokens": 4096},
    )
    assert full.changes == {f"learner.megatron.{key}": value for key, value in FULL.items()}


def test_suggestions_are_the_smallest_the_fastest_first():
    both = found(lambda r: r.learner.distributed_optimizer and r.learner.micro_batch_tokens <= 8192)
    assert {tuple(sorted(s.changes)) for s in both} == {
        ("learner.distributed_optimizer", "learner.micro_batch_tokens")
    }
    assert [s.step_s for s in both] == sorted(s.step_s for s in both)
    budgets = {s.changes["learner.micro_batch_tokens"] for s in both}
    assert budgets == {8192, 4096}  # not below the longest sequence, 4,096 tokens


def test_nodes_come_last_and_refusals_are_passed_over():
    def test(recipe) -> bool:
        if recipe.learner.pipeline_parallel > 1:
            raise RecipeError("refused")
        return recipe.learner.ranks >= 16

    first, *_ = found(test, learner=SHARDED)
    assert first.changes == {"learner.ranks": 16, "slurm.learner_nodes": 2}
    assert first.nodes == 3
    assert found(lambda recipe: False, learner=SHARDED) == []


def test_servers_that_are_too_small_are_made_larger(tmp_path):
    deep = {
        "model": llama(layers=160),
        "learner": {**SHARDED, "ranks": 16, "pipeline_parallel": 8},
    }
    first, *_ = found(lambda recipe: True, **deep, slurm=None)
    assert first.changes["rollout.tensor_parallel"] == 2
    assert first.changes["rollout.servers"] == 4
    # what is suggested can be said with --set
    path = tmp_path / "recipe.yaml"
    path.write_text(models.recipe(**LARGE).to_yaml())
    changed = load(path, [f"{key}={value}" for key, value in first.changes.items()])
    assert changed.rollout.servers == 4
