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
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fp16rl.recipe import Recipe, RecipeError, load
from megatron_fp16rl.recipe.learner import Learner as LearnerSettings
from megatron_fp16rl.rollout.pool import IN_FLIGHT, chunked
from megatron_fp16rl.tools.plan import checks, fit, gpus
from megatron_fp16rl.tools.plan.arithmetic import Costs, costs
from megatron_fp16rl.tools.plan.ask import distinct
from megatron_fp16rl.tools.plan.decoding import (
    Lengths,
    Servers,
    decode_step,
    response_lengths,
    rollout,
)
from megatron_fp16rl.tools.plan.gpus import GPUS
from megatron_fp16rl.tools.plan.rates import SHIPPED, Efficiencies
from megatron_fp16rl.tools.plan.search import suggest
from megatron_fp16rl.tools.plan.times import (
    Step,
    Team,
    estimate,
    learner,
    micro_batches,
    publish,
    servers_of,
    stage_layers,
)
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
    ("count", "room", "job", "under_way", "off"),
    [
        (32, 1000, 0, 1, 1e-3),
        (32, 10, 0, 1, 1e-3),
        (32, 1000, 8, 3, 1e-3),
        (32, 7, 8, 3, 1e-3),
        (1536, 2000, 1, 768, 0.03),  # so many that they are followed in threes
        (1536, 2000, 12, 64, 0.03),
    ],
)
def test_a_servers_batch_over_time(count, room, job, under_way, off):
    """Against a walk token by token."""
    model, prompt = costs(config(models.QWEN3_MOE)), 10
    lengths = Lengths(prompt, 20, 50)
    cache = int(room * (prompt + lengths.mean))
    servers = Servers(2, 1, cache, 4096, 512, job, under_way)
    found = rollout(model, servers, lengths, 2 * count, 8, 2, H100, SHIPPED)

    ends = response_lengths(20, 50, count)
    random.Random(0).shuffle(ends)
    size = job or count
    pieces = [ends[i : i + size] for i in range(0, count, size)]
    left = [len(piece) for piece in pieces]
    waiting = [(job, end) for job in range(under_way) for end in pieces[job]]
    coming = list(range(under_way, len(pieces)))
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
    assert found.decode_s == pytest.approx(seconds, rel=off)
    assert found.queued == (room < count)
    assert 0 < found.tail_s < found.decode_s


@pytest.mark.parametrize(
    ("prompts", "ranks", "servers"),  # x 8 samples; the first has fewer sequences than parts
    [(64, 8, 16), (33, 1, 8), (512, 4, 4), (64, 4, 1)],
)
def test_jobs_of_a_server_are_those_that_the_pool_cuts(prompts, ranks, servers):
    jobs = chunked(list(range(prompts * 8 // ranks)), servers)  # of one leader
    recipe = models.recipe(
        rollout={"prompts": prompts, "samples": 8, "max_new_tokens": 100, "servers": servers},
        learner={"global_batch_size": prompts * 8, "ranks": ranks},
    )
    found = servers_of(recipe, config(LLAMA), H100)
    if servers == 1:
        assert len(jobs) == 1
        assert found.job == 0  # everything at once
    else:
        assert found.job == len(jobs[0])
        assert found.under_way == ranks * IN_FLIGHT


@pytest.mark.parametrize(
    ("chunks", "stages", "multiple"), [(1, 1, 1), (2, 2, 1), (2, 12, 1), (1, 1, 16), (2, 2, 16)]
)
def test_micro_batches_are_those_of_the_learner(chunks, stages, multiple):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_fp16rl.learner.forward import Forward

    model, step = costs(config(LLAMA)), Step(64, 8, Lengths(10, 40, 100))
    team = Team(*(stages, 1, stages, chunks), micro_batch_tokens=330, length_multiple=multiple)
    lengths = torch.tensor([10 + n for n in response_lengths(40, 100, 64)])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        one = SimpleNamespace(
            settings=LearnerSettings(
                global_batch_size=64, micro_batch_tokens=330, pad_to_multiple_of=multiple
            ),
            model=SimpleNamespace(
                chunks=[None] * chunks,
                world=SimpleNamespace(
                    device="cpu",
                    data=SimpleNamespace(group=None),
                    pipeline=SimpleNamespace(size=stages),
                ),
            ),
        )
        batch = SimpleNamespace(lengths=lengths, tokens=lengths)
        real = [part.shape for part in Forward.micro_batches(one, batch)]
    finally:
        dist.destroy_process_group()
    assert micro_batches(model, team, step, 64) == real
    assert all(seq % multiple == 0 for _, seq in real)


@pytest.mark.parametrize(
    ("sequences", "stages", "wanted"),
    [
        (64, 2, [(2, 110)] * 32),  # 220 tokens hold two of the longest, 110
        (64, 3, [(2, 110)] * 33),  # one of 32 is cut in two
        (8, 8, [(1, 110)] * 8),
        (5, 4, [(2, 110)] * 4),  # 2, 1, 1, 1
    ],
)
def test_interleaved_stages_have_equal_micro_batches_of_the_longest(sequences, stages, wanted):
    step = Step(64, 8, Lengths(10, 100, 100))  # all are as long as the limit
    team = Team(stages, pipeline_parallel=stages, model_chunks=2, micro_batch_tokens=220)
    assert micro_batches(costs(config(LLAMA)), team, step, sequences) == wanted
    shorter = Step(64, 8, Lengths(10, 40, 100))
    if sequences == 64:  # and so they are where most are short
        assert micro_batches(costs(config(LLAMA)), team, shorter, sequences) == wanted


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


@pytest.mark.parametrize(
    ("stages", "first", "last"),
    [(1, None, None), (4, None, None), (4, 3, 1), (4, 9, None), (2, 3, 9)],
)
def test_layers_of_stages_are_those_that_megatron_builds(stages, first, last):
    layers = 12
    model = costs(config({**LLAMA, "num_hidden_layers": layers}))
    built = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=stages,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    team = Team(stages, pipeline_parallel=stages, first_stage_layers=first, last_stage_layers=last)
    wanted = [get_num_layers_to_build(built, None, stage) for stage in range(stages)]
    assert stage_layers(model, team) == wanted


@pytest.mark.parametrize(
    ("first", "last", "slowest"),  # layers of the slowest stage, and whether it is the last
    [(None, None, (2, True)), (5, 1, (5, False)), (1, 1, (3, False)), (2, 4, (4, True))],
)
def test_the_slowest_stage_sets_the_pace(first, last, slowest):
    model = costs(config({**LLAMA, "num_hidden_layers": 8, "vocab_size": 100}))
    team = Team(4, pipeline_parallel=4, first_stage_layers=first, last_stage_layers=last)
    found = learner(model, team, Step(8, 2, Lengths(20, 100, 100)), H100, SHIPPED)
    layers, is_last = slowest
    whole, output = 8 * model.forward_flops(120), 8 * 120 * 2 * model.embedding
    work = (whole - output) * layers / 8 + (output if is_last else 0)
    assert found["update_compute"] == pytest.approx(3 * work / (989e12 * SHIPPED.gemm))
    layer = (model.parameters - 2 * model.embedding) / 8
    ends = [first or 2, last or 2]
    between = (8 - sum(ends)) / 2 * layer
    most = max(between, *(n * layer + model.embedding for n in ends))
    assert found["update_optimizer"] == pytest.approx(38 * most / (3350e9 * SHIPPED.memory))


def test_uneven_stages_of_a_recipe_are_timed():
    def score_s(**stages: int) -> float:
        layout = {"ranks": 4, "pipeline_parallel": 4, "global_batch_size": 16, **stages}
        recipe = models.recipe(learner=layout)
        return estimate(recipe, config({**LLAMA, "num_hidden_layers": 8}), H100).score_s

    even, uneven = score_s(), [score_s(first_stage_layers=5), score_s(last_stage_layers=5)]
    assert min(uneven) > even


def seconds_to_rank_0(model: Costs, team: Team, per_node: int) -> float:
    """The way of all weights, from the ranks that Megatron gives them, at full speed."""
    tensor, pipeline, experts, slices = (
        team.tensor_parallel,
        team.pipeline_parallel,
        team.expert_parallel,
        team.expert_tensor_parallel,
    )
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(
        tensor, 1, team.data_parallel, pipeline, team.context_parallel, order
    ).get_ranks
    copies = team.ranks // (pipeline * experts * slices)
    sparse = RankGenerator(slices, experts, copies, pipeline, 1, order).get_ranks
    seconds = 0.0

    def send(numbers: float, source: int, target: int) -> None:
        nonlocal seconds
        if source != target:
            is_near = source // per_node == target // per_node
            seconds += 2 * numbers / (450e9 if is_near else 50e9)

    def group(found: list[list[int]], rank: int) -> list[int]:
        return next(ranks for ranks in found if rank in ranks)

    of_experts = model.sparse_layers * model.experts * model.expert / pipeline
    rest = model.parameters / pipeline - of_experts - 2 * model.embedding / pipeline
    leaders = group(dense("pp"), 0)
    for leader in leaders:
        mine = rest + model.embedding * ((leader == 0) + (leader == leaders[-1]))
        for rank in group(dense("tp"), leader):
            send(mine / tensor, rank, leader)
        for rank in group(sparse("ep"), leader):  # then their experts go, in series
            send(of_experts / experts, rank, leader)
        for rank in group(sparse("tp"), leader):
            send(of_experts / experts / slices, rank, leader)
        send(mine + of_experts, leader, 0)
    return seconds


SPREAD = {
    "Qwen3-30B-A3B": [
        ({"ranks": 8, "expert_parallel": 8}, 8),
        ({"ranks": 16, "tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 8}, 8),
        ({"ranks": 16, "tensor_parallel": 8, "expert_parallel": 16}, 4),
        ({"ranks": 32, "expert_parallel": 4, "expert_tensor_parallel": 2}, 4),
    ],
    "Qwen3-32B": [
        ({"ranks": 8}, 8),  # each rank has the whole model
        ({"ranks": 32, "tensor_parallel": 4, "pipeline_parallel": 2}, 8),
        ({"ranks": 32, "tensor_parallel": 8, "pipeline_parallel": 4}, 8),
        ({"ranks": 16, "tensor_parallel": 8, "pipeline_parallel": 2}, 4),
    ],
    "Qwen3-235B-A22B": [
        ({"ranks": 64, "tensor_parallel": 4, "context_parallel": 2, "pipeline_parallel": 2,
          "expert_parallel": 16}, 8),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layout", "per_node"), [(name, *case) for name in SPREAD for case in SPREAD[name]]
)
def test_a_sync_gathers_along_megatrons_ranks(name, layout, per_node):
    model, team = fit.model(name), Team(**layout)
    gpu = dataclasses.replace(H100, per_node=per_node)
    rates = dataclasses.replace(SHIPPED, network=1.0)
    tensors = 1e-4 * (model.layers * 9 + 3 * model.sparse_layers * model.experts)
    gathered = seconds_to_rank_0(model, team, per_node)
    size = 2 * model.parameters
    found = {way: publish(model, team, way, 2, gpu, rates) for way in ("link", "network", "disk")}
    assert found["link"] == pytest.approx(gathered + size / 450e9 + tensors)
    assert found["network"] == pytest.approx(gathered + size / 50e9 + tensors)
    # written to a shared disk and read from there, at the speed that docs/planner.md says
    assert found["disk"] == pytest.approx(gathered + 2 * size / 2e9 + tensors)


def test_leaders_of_stages_are_on_other_nodes_where_replicas_fill_those():
    model = fit.model("Qwen3-32B")
    rates = dataclasses.replace(SHIPPED, network=1.0)
    # TP 4 x PP 2 is 8 ranks, but of 32 the second stage begins at rank 16
    near = publish(model, Team(8, 4, 2), "network", 2, H100, rates)
    far = publish(model, Team(32, 4, 2), "network", 2, H100, rates)
    assert far - near == pytest.approx(model.parameters * (1 / 50e9 - 1 / 450e9))


def test_nodes_are_as_large_as_the_recipe_says():
    def learnt(gpus_per_node: int, learner_nodes: int) -> tuple[float, int]:
        recipe = models.recipe(
            rollout={"prompts": 16, "samples": 8, "max_new_tokens": 2000, "servers": 2},
            learner={
                "global_batch_size": 128,
                "ranks": 8,
                "tensor_parallel": 8,
                "sequence_parallel": True,
            },
            slurm={
                "gpus_per_node": gpus_per_node,
                "learner_nodes": learner_nodes,
                "rollout_nodes": 1,
            },
        )
        gpu = gpus.of("h100-80gb", recipe)
        wide = config({**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 8})
        return estimate(recipe, wide, gpu).breakdown["update_tensor_parallel"], gpu.per_node

    (one, eight), (two, four) = learnt(8, 1), learnt(4, 2)
    assert (eight, four) == (8, 4)
    # a ring over two nodes of four is as fast as four network cards, not as the links within
    assert two == pytest.approx(one * 450 / (4 * 50))
    apart, _ = learnt(8, 2)  # four ranks to a node: so Slurm starts them
    assert apart == pytest.approx(two)
    assert gpus.of("h100-80gb", models.recipe()) == H100


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({}, "link"),  # 4 ranks and 4 servers are on one node
        ({"slurm": {"learner_nodes": 1, "rollout_nodes": 1}}, "network"),
        ({"slurm": {"learner_nodes": 2, "gpus_per_node": 4}}, "network"),
        ({"sync": {"transport": "disk"}}, "disk"),
    ],
)
def test_weights_go_the_way_of_the_recipe(changes, way):
    recipe = models.recipe(
        rollout={"prompts": 16, "samples": 8, "max_new_tokens": 2000, "servers": 4},
        learner={"global_batch_size": 128, "ranks": 4},
        **changes,
    )
    model = config({**LLAMA, "max_position_embeddings": 4096})
    found = estimate(recipe, model, gpus.of("h100-80gb", recipe)).sync_s
    assert found == pytest.approx(publish(costs(model), Team(4), way, 2, H100, SHIPPED))


def test_recipes_have_one_plan_only_where_nothing_of_it_differs():
    def changed(**changes: object) -> Recipe:
        rollout = {"prompts": 4, "samples": 4, "max_new_tokens": 1000}
        return models.recipe(rollout=rollout, **changes)

    plain = changed()
    alike = [
        changed(learner={**plain.learner.model_dump(), "optimizer": {"lr": 1e-3}}),
        changed(algorithm={"clip_high": 0.3}),
        changed(trainer={**plain.trainer.model_dump(), "seed": 7}),
    ]
    assert distinct([plain, *alike]) == [plain]
    penalty = [changed(algorithm={"kl": {"coefficient": c}}) for c in (0.1, 0.2)]
    warm = changed(learner={**plain.learner.model_dump(), "optimizer": {"warmup_updates": 10**6}})
    found = distinct([plain, *penalty, warm])
    assert len(found) == 3
    assert all(recipe in found for recipe in (plain, penalty[0], warm))
    model = config({**LLAMA, "max_position_embeddings": 4096})
    times = [estimate(recipe, model, H100).score_s for recipe in (plain, *penalty)]
    assert times[1] == times[2] == pytest.approx(2 * times[0])
    said = [checks.warnings(recipe, model, 1.0) for recipe in (plain, warm)]
    assert len(said[1]) == len(said[0]) + 1


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
    page = Path(__file__).parents[2] / "docs/planner.md"
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
