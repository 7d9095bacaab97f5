"""Counts of models against transformers and torch; servers, times, warnings and suggestions by hand."""

import dataclasses
import itertools
import math
import typing

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fp16rl.recipe import Gpu, load
from megatron_fp16rl.tools.plan import checks, times
from megatron_fp16rl.tools.plan.costs import costs
from megatron_fp16rl.tools.plan.gpus import GPUS, gpu_of
from megatron_fp16rl.tools.plan.lengths import largest_micro_batch
from megatron_fp16rl.tools.plan.rank import RankMemory, in_flight
from megatron_fp16rl.tools.plan.servers import (
    admitted,
    admitted_experts,
    padded_vocabulary,
    refusal,
    server_memory,
    token_bytes,
)
from megatron_fp16rl.tools.plan.submission import distinct
from megatron_fp16rl.tools.plan.suggest import suggest
from megatron_fp16rl.tools.plan.times import estimate, response_lengths
from tests import models
from tests.workers import planning

ALL = {**models.FAMILIES, **models.MOE_FAMILIES}
H100 = GPUS["h100-80gb"]
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def config(values, **changes):
    return AutoConfig.for_model(**{"vocab_size": 97, **values, **changes})


def recipe(rollout=None, learner=None, **sections):
    """512 sequences of an addition (prompts of 6 tokens) a step, in one update."""
    rollout = {"prompts": 64, "samples": 8, "max_new_tokens": 4090, **(rollout or {})}
    learner = {"global_batch_size": 512, "micro_batch_tokens": 16384, **(learner or {})}
    return models.recipe(rollout=rollout, learner=learner, **sections)


# Counts


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_flops_are_those_of_transformers_and_torch(name):
    seq = 24
    options = {"experts_implementation": "batched_mm"} if name in models.MOE_FAMILIES else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config(ALL[name]), attn_implementation="eager", **options
        )
        tokens = torch.zeros(2, seq, dtype=torch.long)
    counted = costs(config(ALL[name]))
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(tokens)
    forward = seq * (counted.layer_flops + counted.output_flops)
    forward += counted.attention_flops(seq * seq)  # eager attention multiplies what is masked, too
    assert flops.get_total_flops() == 2 * forward


def test_sizes_are_the_published_ones():
    assert costs(config(QWEN3_30B)).parameters == pytest.approx(30.5e9, rel=0.005)
    assert costs(config(LLAMA_8B)).parameters == pytest.approx(8.03e9, rel=0.005)
    deepseek = costs(AutoConfig.for_model("deepseek_v3"))
    assert deepseek.parameters == pytest.approx(671e9, rel=0.005)


def test_distinct_experts_are_those_of_random_choices():
    counted = costs(config(models.QWEN3_MOE))  # 2 of 8
    pairs = list(itertools.combinations(range(8), 2))
    chosen = [len({*a, *b, *c}) for a, b, c in itertools.product(pairs, repeat=3)]
    assert counted.distinct_experts(3) == pytest.approx(sum(chosen) / len(chosen))


# Memory


def test_largest_micro_batch_counts_the_padding():
    plain = planning.recipe({"ranks": 1})
    shapes = {}
    for multiple in (1, 48):
        learner = plain.learner.model_copy(update={"pad_to_multiple_of": multiple})
        batch = largest_micro_batch(plain.model_copy(update={"learner": learner}))
        shapes[multiple] = (batch.rows, batch.seq)
    assert shapes == {1: (2, 64), 48: (1, 96)}  # of 128 tokens at most


def test_the_peak_counts_the_batch_of_an_update_or_the_sync():
    zeros = dict.fromkeys((field.name for field in dataclasses.fields(RankMemory)), 0)
    assert RankMemory(**zeros | {"batch": 7, "activations": 2, "sync": 8}).peak == 9
    assert RankMemory(**zeros | {"batch": 7, "activations": 2, "sync": 10}).peak == 10


def test_activations_in_flight_are_those_of_megatrons_schedules():
    """As counted by hand in Narayanan et al. 2021 (arXiv 2104.04473), figures 3 and 4."""
    assert [len(in_flight(4, 1, stage, 8)) for stage in range(4)] == [4, 3, 2, 1]
    assert [len(in_flight(4, 1, stage, 2)) for stage in range(4)] == [2, 2, 2, 1]
    assert in_flight(4, 2, 3, 8) == [0, 0, 0, 0, 1]
    assert in_flight(4, 2, 0, 8) == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]


# Servers


def test_cache_of_a_token():
    grouped = costs(config(QWEN3_30B))
    # 48 layers, keys and values of 128 numbers in 2 bytes, of 4, 2, 1 heads a rank; then replicas
    sizes = [token_bytes(grouped, parts, 2) for parts in (1, 2, 4, 8)]
    assert sizes == [98304, 49152, 24576, 24576]
    latent = costs(AutoConfig.for_model("deepseek_v3"))
    # 61 layers of 512 + 64 numbers, whole on every rank
    assert [token_bytes(latent, parts, 2) for parts in (1, 8, 32)] == [70272] * 3


def test_sequences_that_a_server_holds():
    def memory(**sglang):
        return server_memory(
            recipe({"tensor_parallel": 2, "sglang": sglang}), config(QWEN3_30B), H100
        )

    plain = memory()
    assert plain.reasons == []
    assert plain.weights == pytest.approx(30.5e9, rel=0.01)  # 30.5e9 parameters, 2 bytes, 2 ranks
    assert plain.kv_tokens == plain.kv_cache // 49152
    assert plain.running == plain.kv_tokens // 4096
    assert plain.wanted == 512
    capped = memory(**{"max-total-tokens": 10000, "max_running_requests": 5})
    assert (capped.kv_tokens, capped.max_running, capped.running) == (10000, 5, 2)
    half = memory(mem_fraction_static=0.5)
    assert half.static_fraction == 0.5
    assert half.kv_tokens < plain.kv_tokens


def test_servers_that_sglang_would_not_start_are_refused_with_the_reason():
    (reason,) = server_memory(recipe(), config(QWEN3_30B, num_hidden_layers=72), H100).reasons
    assert "rollout.tensor_parallel" in reason
    assert "longest sequence has 4096" in reason

    def refused(parts, model, **sglang):
        return refusal(recipe({"tensor_parallel": parts, "sglang": sglang}), model)

    sparse, dense = config(QWEN3_30B), config(models.QWEN3)
    assert refused(4, sparse) is None
    assert refused(4, sparse, ep_size=4) is None
    assert "num_attention_heads=32" in refused(3, sparse)
    assert "ep_size=3" in refused(4, sparse, **{"ep-size": 3})
    assert "no experts" in refused(2, dense, ep=2)
    assert admitted(sparse) == [1, 2, 4, 8, 16, 32]
    assert admitted_experts(sparse, 8) == [1, 2, 4, 8]
    assert admitted_experts(dense, 4) == [1]
    # 12 heads and 4 of keys and values: 3 ranks can share the first, not the second
    odd = config(models.QWEN3, num_attention_heads=12, num_key_value_heads=4, intermediate_size=96)
    assert admitted(odd) == [1, 2, 4, 12]
    assert [padded_vocabulary(97, parts) for parts in (1, 3)] == [128, 192]


def test_every_gpu_of_a_recipe_is_known():
    assert set(GPUS) == set(typing.get_args(Gpu))
    for gpu in GPUS.values():  # what a driver keeps for itself is a percent or two
        assert 0.95 * gpu.total_mib < 1024 * gpu.memory_gib < gpu.total_mib
    four = recipe(slurm={"gpus_per_node": 4, "learner_nodes": 1})
    assert gpu_of("h100-80gb", four).per_node == 4
    assert gpu_of("h100-80gb", recipe()) == H100


# Times


def test_lengths_have_their_mean_and_their_tail():
    most, count = 8000, 4000
    for share in (0.1, 0.5, 0.8, 1.0):
        lengths = response_lengths(share * most, most, count)
        assert sum(lengths) / count == pytest.approx(share * most, rel=0.01)
        assert lengths == sorted(lengths)
        assert lengths[-1] == most
    # the root of x (1 - exp(-1 / x)) = 1/2 is 0.6275: a fifth is cut
    lengths = response_lengths(most / 2, most, count)
    assert lengths.count(most) / count == pytest.approx(math.exp(-1 / 0.6275), abs=0.01)


def test_an_estimate_adds_up():
    kl = recipe(
        {"servers": 2}, {"ranks": 4, "global_batch_size": 128}, algorithm={"kl": {"coefficient": 1}}
    )
    whole = estimate(kl, config(LLAMA_8B), H100)
    parts = (whole.rollout_s, whole.score_s, whole.update_s, whole.sync_s)
    assert min(parts) > 0
    assert whole.step_s == pytest.approx(sum(parts))
    overlapped = max(whole.rollout_s, whole.score_s + whole.update_s) + whole.sync_s
    assert whole.one_step_off_s == pytest.approx(overlapped)
    mean = 6 + whole.breakdown["mean_response_tokens"]
    assert whole.tokens_per_s_per_gpu == pytest.approx(512 * mean / whole.step_s / 6)
    shorter = estimate(kl, config(LLAMA_8B), H100, mean_tokens=100)
    assert shorter.rollout_s < whole.rollout_s
    assert shorter.update_s < whole.update_s


def test_a_learner_on_one_gpu_is_flops_over_speed():
    model = costs(config(LLAMA_8B))

    def learnt(**learner):
        # all responses are as long as the limit: 512 sequences of 4,096 tokens
        return estimate(recipe(learner=learner), config(LLAMA_8B), H100, mean_tokens=4090)

    flops = 4096 * (model.layer_flops + model.output_flops)
    flops += model.attention_flops(4096 * 4097 / 2)
    forward = 512 * flops / (989e12 * times.GEMM)
    plain = learnt()
    assert plain.score_s == pytest.approx(forward)
    assert plain.breakdown["update_compute"] == pytest.approx(3 * forward)
    optimizer = 38 * model.parameters / (3350e9 * times.MEMORY)
    assert plain.update_s == pytest.approx(3 * forward + optimizer)
    full = learnt(megatron={"recompute_granularity": "full"})
    assert full.breakdown["update_compute"] == pytest.approx(4 * forward)
    # two stages, 128 micro-batches of four sequences: each waits for one of them
    piped = learnt(ranks=2, pipeline_parallel=2).breakdown
    assert piped["update_bubble"] == pytest.approx(piped["update_compute"] / 128)
    replicated = learnt(ranks=4)
    assert replicated.score_s == pytest.approx(forward / 4)
    assert replicated.breakdown["update_data_parallel"] > 0


def test_decoding_is_bytes_over_bandwidth():
    """Weights and the cache of what runs, and the step's own time; what has no room waits."""

    def decode(sequences, at_once):
        prompts = {"prompts": sequences // 2, "samples": 2}
        planned = recipe(
            {**prompts, "sglang": {"max_running_requests": at_once}},
            {"global_batch_size": sequences},
        )
        times = estimate(planned, config(LLAMA_8B), H100, mean_tokens=4090)
        return times.breakdown["decode"]

    model = costs(config(LLAMA_8B))
    weights = 2 * (model.parameters - model.embedding)
    cached = (6 + 4090 / 2) * 32 * 2 * 8 * 128 * 2  # half-way: layers, keys and values, heads
    step = (weights + cached) / (3350e9 * times.MEMORY) + times.DECODE_STEP_S
    assert decode(2, at_once=1) == pytest.approx(2 * 4090 * step, rel=1e-2)  # padded vocabulary
    assert decode(8, at_once=2) == pytest.approx(4 * decode(2, at_once=2))


def test_links_within_a_node_and_the_network_between():
    def of(nodes, gpus_per_node=8, **sections):
        planned = recipe(
            {"servers": 4},
            {"ranks": 8, "tensor_parallel": 8, "sequence_parallel": True},
            slurm={"gpus_per_node": gpus_per_node, "learner_nodes": nodes, "rollout_nodes": 1},
            **sections,
        )
        return estimate(planned, config(LLAMA_8B), gpu_of("h100-80gb", planned))

    one, two = of(1), of(2, gpus_per_node=4)
    exchanged = [e.breakdown["update_tensor_parallel"] for e in (one, two)]
    # a ring over two nodes of four is as fast as four network cards, not as the links within
    assert exchanged[1] == pytest.approx(exchanged[0] * 450 / (4 * 50))
    size, model = 2 * 8.03e9, costs(config(LLAMA_8B))
    tensors = 9 * model.layers * times.TENSOR_S
    hops = size / times.NETWORK * (1 / 450e9 + 1 / 50e9)  # to rank 0, and to the other node
    assert one.sync_s == pytest.approx(hops + tensors, rel=0.01)
    assert two.sync_s == pytest.approx(2 * size / times.NETWORK / 50e9 + tensors, rel=0.01)
    disk = of(1, sync={"transport": "disk"})
    hop = size / times.NETWORK / 450e9
    assert disk.sync_s == pytest.approx(hop + 2 * size / 2e9 + tensors, rel=0.01)


# Warnings and suggestions


def test_recipes_share_a_plan_only_where_nothing_of_it_differs():
    plain = recipe()

    def learning(**optimizer):
        return recipe(learner={"optimizer": optimizer})

    seed = recipe(trainer={**plain.trainer.model_dump(), "seed": 7})
    assert distinct([plain, learning(lr=1e-3), recipe(algorithm={"clip_high": 0.3}), seed]) == [
        plain
    ]
    penalty = [recipe(algorithm={"kl": {"coefficient": c}}) for c in (0.1, 0.2)]
    warm = learning(warmup_updates=10**6)
    plans = distinct([plain, *penalty, warm])
    assert len(plans) == 3
    assert all(recipe in plans for recipe in (plain, penalty[0], warm))
    scores = [estimate(r, config(LLAMA_8B), H100).score_s for r in (plain, *penalty)]
    assert scores[1] == scores[2] == pytest.approx(2 * scores[0])
    lines = [checks.warnings(r, config(LLAMA_8B), 1.0) for r in (plain, warm)]
    assert len(lines[1]) == len(lines[0]) + 1


def test_time_limits_that_a_job_cannot_keep_are_warned_of():
    def about_time(time, step_s):
        slurm = {"learner_nodes": 1, "rollout_nodes": 1, "time": time}
        lines = checks.warnings(recipe(slurm=slurm), config(LLAMA_8B), step_s)
        return [line for line in lines if "slurm.time" in line]

    assert "requeued without end" in about_time("1:00:00", 4000)[0]
    assert "is queued about" in about_time("1:00:00", 2000)[0]
    assert about_time("UNLIMITED", 10**6) == about_time("1-0", 10) == []


SLURM = {"learner_nodes": 1, "rollout_nodes": 1}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def suggestions(fits, rollout=None, model=LLAMA_8B, **learner):
    planned = recipe({"servers": 8, **(rollout or {})}, {"ranks": 8, **learner}, slurm=SLURM)
    return suggest(planned, config(model), H100, fits)


def test_single_changes_are_suggested_the_fastest_first():
    (one,) = suggestions(lambda recipe: recipe.learner.distributed_optimizer)
    assert one.changes == {"learner.distributed_optimizer": True}
    assert one.nodes == 2
    (full,) = suggestions(lambda r: r.learner.megatron.get("recompute_granularity") == "full")
    assert full.changes == {f"learner.megatron.{key}": value for key, value in FULL.items()}
    several = suggestions(lambda recipe: recipe.learner.micro_batch_tokens <= 8192)
    budgets = {s.changes["learner.micro_batch_tokens"] for s in several}
    assert budgets == {8192, 4096}  # not below the longest sequence, 4,096 tokens
    assert [s.step_s for s in several] == sorted(s.step_s for s in several)
    assert suggestions(lambda recipe: False) == []


def test_more_nodes_are_the_last_resort():
    first, *_ = suggestions(lambda recipe: recipe.learner.ranks >= 16)
    assert first.changes == {"learner.ranks": 16, "slurm.learner_nodes": 2}
    assert first.nodes == 3


def test_servers_that_are_too_small_are_made_larger(tmp_path):
    deep = {**LLAMA_8B, "num_hidden_layers": 160}
    (first,) = suggestions(lambda recipe: True, model=deep)
    assert first.changes == {"rollout.tensor_parallel": 2, "rollout.servers": 4}
    (both,) = suggestions(lambda recipe: recipe.learner.distributed_optimizer, model=deep)
    assert both.changes == {**first.changes, "learner.distributed_optimizer": True}
    # what is suggested can be said with --set
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe({"servers": 8}).to_yaml())
    changed = load(path, [f"{key}={value}" for key, value in first.changes.items()])
    assert changed.rollout.servers == 4
