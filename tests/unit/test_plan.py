"""Counts of models against transformers and torch; servers, times, warnings and suggestions by hand."""

import itertools
import typing

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fp16rl.models.costs import costs
from megatron_fp16rl.models.source import shape_config
from megatron_fp16rl.recipe import Gpu, load
from megatron_fp16rl.tools.plan import checks, times
from megatron_fp16rl.tools.plan.gpus import GPUS, gpu_of
from megatron_fp16rl.tools.plan.lengths import largest_micro_batch, packing
from megatron_fp16rl.tools.plan.rank import in_flight
from megatron_fp16rl.tools.plan.servers import refusals, server_memory
from megatron_fp16rl.tools.plan.submission import distinct
from megatron_fp16rl.tools.plan.suggest import balance, changed_recipe, suggest
from megatron_fp16rl.tools.plan.times import estimate
from megatron_fp16rl.tools.recipes import RECIPES
from tests import models
from tests.workers import planning

ALL = {**models.FAMILIES, **models.MOE_FAMILIES}
H100 = GPUS["h100-80gb"]
LLAMA_8B = shape_config(str(RECIPES / "models/llama-3.1-8b-instruct.json"))
QWEN3_30B = shape_config(str(RECIPES / "models/qwen3-30b-a3b-base.json"))


def config(values, **changes):
    return AutoConfig.for_model(**{"vocab_size": 97, **values, **changes})


ANCHORED = {"algorithm": {"old_policy": "rollout"}}


def recipe(rollout=None, learner=None, **sections):
    """512 sequences of an addition (prompts of 6 tokens) a step, in one update."""
    rollout = {"prompts": 64, "samples": 8, "max_new_tokens": 4090, **(rollout or {})}
    learner = {"global_batch_size": 512, "micro_batch_tokens": 16384, **(learner or {})}
    return models.recipe(rollout=rollout, learner=learner, **sections)


# Counts


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_flops_are_those_of_transformers_and_torch(name):
    seq = 64  # a whole chunk of a gated delta net
    options = {"experts_implementation": "batched_mm"} if name in models.MOE_FAMILIES else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config(ALL[name]), attn_implementation="eager", **options
        )
        tokens = torch.zeros(2, seq, dtype=torch.long)
    counted = costs(config(ALL[name]))
    named = [(n, p) for n, p in model.named_parameters() if not n.endswith("bias")]
    matrices = sum(p.numel() for _, p in named if p.ndim > 1)
    assert counted.parameters == pytest.approx(matrices, rel=1e-3)  # but for a shared expert's gate
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(tokens)
    forward = seq * (counted.layer_flops + counted.output_flops)
    forward += counted.attention_flops(seq * seq)  # eager attention multiplies what is masked, too
    assert flops.get_total_flops() == pytest.approx(2 * forward, rel=2e-3)


def test_distinct_experts_are_those_of_random_choices():
    counted = costs(config(models.QWEN3_MOE))  # 2 of 8
    pairs = list(itertools.combinations(range(8), 2))
    chosen = [len({*a, *b, *c}) for a, b, c in itertools.product(pairs, repeat=3)]
    assert counted.distinct_experts(3) == pytest.approx(sum(chosen) / len(chosen))


# Memory


def test_largest_micro_batch_counts_the_padding():
    def largest(**learner):
        plain = planning.recipe({"ranks": 1})
        changed = plain.learner.model_copy(update={"pad_to_multiple_of": 1, **learner})
        return largest_micro_batch(plain.model_copy(update={"learner": changed}))

    # Of 128 tokens at most, but for what a row is padded to.
    for packed, multiple, shape in (
        (False, 1, (2, 64)),
        (False, 48, (1, 96)),
        (True, 1, (1, 128)),
        (True, 48, (1, 144)),
    ):
        batch = largest(packing=packed, pad_to_multiple_of=multiple)
        assert (batch.rows, batch.seq) == shape
    # Context-parallel ranks share one.
    shared = largest(ranks=4, context_parallel=4, micro_batch_tokens=32)
    assert (shared.rows, shared.seq) == (1, 32)
    assert shared.response == largest().response // 4


def test_activations_in_flight_are_those_of_megatrons_schedules():
    """As counted by hand in Narayanan et al. 2021 (arXiv 2104.04473), figures 3 and 4."""
    assert [len(in_flight(4, 1, stage, 8)) for stage in range(4)] == [4, 3, 2, 1]
    assert [len(in_flight(4, 1, stage, 2)) for stage in range(4)] == [2, 2, 2, 1]
    assert in_flight(4, 2, 3, 8) == [0, 0, 0, 0, 1]
    assert in_flight(4, 2, 0, 8) == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]


# Servers


def test_cache_of_a_token():
    def sizes(model, all_parts):
        planned = (recipe({"tensor_parallel": parts}) for parts in all_parts)
        return [server_memory(each, model, H100).token_bytes for each in planned]

    # 48 layers, keys and values of 128 numbers in 2 bytes, of 4, 2, 1 heads a rank; then replicas
    assert sizes(QWEN3_30B, (1, 2, 4, 8)) == [98304, 49152, 24576, 24576]
    # 61 layers of 512 + 64 numbers, whole on every rank
    assert sizes(AutoConfig.for_model("deepseek_v3"), (1, 8, 32)) == [70272] * 3


def test_sequences_that_a_server_holds():
    def memory(**sglang):
        return server_memory(recipe({"tensor_parallel": 2, "sglang": sglang}), QWEN3_30B, H100)

    plain = memory()
    assert plain.reasons == []
    assert plain.weights == pytest.approx(30.5e9, rel=0.01)  # 30.5e9 parameters, 2 bytes, 2 ranks
    assert plain.kv_tokens == plain.kv_cache // 49152
    assert plain.running == plain.kv_tokens // 4096
    assert plain.wanted == 512
    capped = memory(**{"max-total-tokens": 10000, "max_running_requests": 5})
    assert (capped.kv_tokens, capped.running) == (10000, 2)
    half = memory(mem_fraction_static=0.5)
    assert half.static_fraction == 0.5
    assert half.kv_tokens < plain.kv_tokens


@pytest.mark.parametrize(
    ("parts", "head", "of_token"),
    [(1, None, 2 + 4), (1, "fp32", 4), (2, None, 1 + 2 + 4), (2, "fp32", 2 + 4 + 4)],
)
def test_logits_of_a_decode_step(parts, head, of_token):
    """A rank's shard and what is gathered, and the fp32 buffer, which an fp32 product of one rank fills itself."""

    def memory(prompts, **sglang):
        rollout = {"prompts": prompts, "tensor_parallel": parts, "sglang": sglang}
        planned = recipe(rollout, {"global_batch_size": 8 * prompts}, precision={"head": head})
        return server_memory(planned, QWEN3_30B, H100)

    assert memory(64).logits == 512 * 151936 * of_token
    assert memory(64, max_running_requests=5).logits == 5 * 151936 * of_token
    assert memory(10000).logits == 4096 * 151936 * of_token  # SGLang runs no more by itself
    assert memory(10000, mem_fraction_static=0.9).reasons == []
    (reason,) = memory(10000, mem_fraction_static=0.98).reasons
    assert f"logits of 4096 sequences are {4096 * 151936 * of_token / 2**30:.1f} GiB" in reason


def test_servers_that_sglang_would_not_start_are_refused_with_the_reason():
    deeper = AutoConfig.for_model(**{**QWEN3_30B.to_dict(), "num_hidden_layers": 72})
    (reason,) = server_memory(recipe(), deeper, H100).reasons
    assert "rollout.tensor_parallel" in reason
    assert "longest sequence has 4096" in reason

    def refused(parts, model, experts=1):
        return " ".join(refusals(costs(model), parts, experts))

    sparse, dense = QWEN3_30B, config(models.QWEN3)
    assert refused(4, sparse) == refused(4, sparse, experts=4) == ""
    assert "num_attention_heads=32" in refused(3, sparse)
    # 12 heads and 4 of keys and values: 3 ranks can share the first, not the second
    odd = config(models.QWEN3, num_attention_heads=12, num_key_value_heads=4)
    assert "num_key_value_heads=4" in refused(3, odd)
    assert "ep_size=3 must divide" in refused(4, sparse, experts=3)
    assert "0 experts" in refused(2, dense, experts=2)
    spelled = recipe({"tensor_parallel": 4, "sglang": {"ep-size": 3}})
    assert "ep_size=3" in server_memory(spelled, QWEN3_30B, H100).reasons[0]


def test_every_gpu_of_a_recipe_is_known():
    assert set(GPUS) == set(typing.get_args(Gpu))
    four = recipe(slurm={"gpus_per_node": 4, "learner_nodes": 1})
    assert gpu_of("h100-80gb", four).per_node == 4
    assert gpu_of("h100-80gb", recipe()) == H100


# Times


def test_a_learner_on_one_gpu_is_flops_over_speed():
    model = costs(LLAMA_8B)

    def learnt(**learner):
        # all responses are as long as the limit: 512 sequences of 4,096 tokens
        return estimate(recipe(learner=learner), LLAMA_8B, H100, mean_tokens=4090)

    flops = 4096 * (model.layer_flops + model.output_flops)
    flops += model.attention_flops(4096**2 / 2)
    forward = 512 * flops / (989e12 * times.GEMM)
    plain = learnt()
    assert plain.score_s == pytest.approx(forward)
    assert plain.update_s == pytest.approx(3 * forward)
    assert learnt(megatron={"recompute_granularity": "full"}).update_s == pytest.approx(4 * forward)
    # two stages, 128 micro-batches of four sequences: each waits for one of them
    piped = learnt(ranks=2, pipeline_parallel=2)
    assert piped.update_s == pytest.approx(3 * forward / 2 * (1 + 1 / 128))


@pytest.mark.parametrize(
    ("learner", "products", "ranks"),
    [
        ({}, 2, 1),
        ({"lora": {"rank": 1, "alpha": 1}}, 1, 1),
        ({"ranks": 4, "pipeline_parallel": 2}, 2, 2),
    ],
)
def test_an_fp32_head_goes_back_at_half_the_rate(learner, products, ranks):
    """Its gradients of hidden states and of the weight, which adapters do not ask for; on the last stage."""
    plain, wide = (
        estimate(
            recipe(learner=learner, precision={"head": head}), LLAMA_8B, H100, mean_tokens=4090
        )
        for head in (None, "fp32")
    )
    flops = 2 * 128256 * 4096  # of a response's token, in one product
    at_once = 989e12 * times.GEMM * ranks
    assert wide.update_s - plain.update_s == pytest.approx(products * 512 * 4090 * flops / at_once)
    assert (wide.score_s, wide.rollout_s) == (plain.score_s, plain.rollout_s)


def test_decoding_is_bytes_over_bandwidth():
    """Weights and the cache of what runs, and the step's own time; what has no room waits."""

    def decode(sequences, at_once):
        planned = recipe(
            {
                "prompts": sequences // 2,
                "samples": 2,
                "sglang": {"max_running_requests": at_once},
            },
            {"global_batch_size": sequences},
        )
        return estimate(planned, LLAMA_8B, H100, mean_tokens=4090).breakdown["decode"]

    model = costs(LLAMA_8B)
    weights = 2 * (model.parameters - model.embedding)
    cached = 6 + times.CACHED_SHARE * 4090
    cache = cached * 32 * 2 * 8 * 128 * 2  # layers, keys and values, heads
    step = (weights + cache) / (3350e9 * times.MEMORY) + times.DECODE_STEP_S
    assert decode(2, at_once=1) == pytest.approx(2 * 4090 * step)
    assert decode(8, at_once=2) == pytest.approx(4 * decode(2, at_once=2))


def test_a_step_is_the_sum_of_its_parts_or_one_ahead_as_long_as_its_slower_side():
    """Ahead, with a loss anchored at mu, there is no score pass; one side waits for the other."""
    serial = estimate(recipe(), LLAMA_8B, H100)
    learnt = serial.score_s + serial.update_s
    assert min(serial.rollout_s, serial.score_s, serial.update_s, serial.sync_s) > 0
    assert serial.step_s == pytest.approx(serial.rollout_s + learnt + serial.sync_s)
    assert serial.one_step_off_s == pytest.approx(max(serial.rollout_s, learnt) + serial.sync_s)
    assert (serial.learner_waits_s, serial.servers_wait_s) == (serial.rollout_s, learnt)
    mean = 6 + serial.breakdown["mean_response_tokens"]
    assert serial.tokens_per_s_per_gpu == pytest.approx(512 * mean / serial.step_s / 2)
    for servers in (1, 1000):
        ahead = estimate(recipe({"ahead": 1, "servers": servers}, **ANCHORED), LLAMA_8B, H100)
        assert ahead.score_s == 0
        assert ahead.update_s == serial.update_s
        gap = ahead.rollout_s - ahead.update_s
        assert ahead.step_s == max(ahead.rollout_s, ahead.update_s) + ahead.sync_s
        assert ahead.step_s == ahead.one_step_off_s
        assert (ahead.learner_waits_s, ahead.servers_wait_s) == (max(0, gap), max(0, -gap))
    corrected = {"correction": {"ratio": "token", "action": "truncate", "high": 2.0}}
    planned = recipe({"ahead": 1}, algorithm=corrected)
    assert estimate(planned, LLAMA_8B, H100).score_s == serial.score_s


# Warnings and suggestions


def test_nodes_change_sides_where_one_waits():
    """The fastest split that fits; ranks and servers go with their nodes."""
    slurm = {"learner_nodes": 1, "rollout_nodes": 5, "gpus_per_node": 1}
    planned = recipe({"ahead": 1, "servers": 5}, {"ranks": 1}, slurm=slurm, **ANCHORED)
    (best,) = balance(planned, LLAMA_8B, H100, lambda recipe: True)
    moved = changed_recipe(planned, best.changes)
    assert moved.learner.ranks == moved.slurm.learner_nodes > 1
    assert moved.rollout.servers == moved.slurm.rollout_nodes
    assert moved.slurm.learner_nodes + moved.slurm.rollout_nodes == best.nodes == 6
    assert best.step_s == estimate(moved, LLAMA_8B, H100).step_s
    assert best.step_s < 0.95 * estimate(planned, LLAMA_8B, H100).step_s
    # No other is faster than what is planned, and a plan that is balanced is left alone.
    assert balance(planned, LLAMA_8B, H100, lambda recipe: recipe != moved) == []
    assert balance(moved, LLAMA_8B, H100, lambda recipe: True) == []


def test_recipes_share_a_plan_only_where_nothing_of_it_differs():
    plain = recipe()
    seed = recipe(trainer={**plain.trainer.model_dump(), "seed": 7})
    faster = recipe(learner={"optimizer": {"lr": 1e-3}})
    assert distinct([plain, faster, recipe(algorithm={"clip_high": 0.3}), seed]) == [plain]
    penalty = recipe(algorithm={"kl": {"coefficient": 0.1}})
    assert len(distinct([plain, penalty])) == 2
    scores = [estimate(r, LLAMA_8B, H100).score_s for r in (plain, penalty)]
    assert scores[1] == pytest.approx(2 * scores[0])


def test_time_limits_that_a_job_cannot_keep_are_warned_of():
    def about_time(time, step_s):
        slurm = {"learner_nodes": 1, "rollout_nodes": 1, "time": time}
        lines = checks.warnings(recipe(slurm=slurm), LLAMA_8B, step_s)
        return [line for line in lines if "slurm.time" in line]

    assert "requeued without end" in about_time("1:00:00", 4000)[0]
    assert "is queued about" in about_time("1:00:00", 2000)[0]
    assert about_time("UNLIMITED", 10**6) == about_time("1-0", 10) == []


def test_gpus_that_nobody_uses_are_warned_of():
    nodes = {"learner_nodes": 1, "rollout_nodes": 3}
    planned = recipe({"servers": 8}, {"ranks": 8}, slurm=nodes)
    lines = checks.warnings(planned, LLAMA_8B, 1)
    (idle,) = [line for line in lines if "are used" in line]
    assert (
        idle
        == "slurm.rollout_nodes=3 x gpus_per_node=8 are 24 GPUs, of which 8 are used: 1 node(s) would do"
    )


def test_single_changes_are_suggested_as_set_takes_them(tmp_path):
    planned = recipe({"servers": 8}, {"ranks": 8}, slurm={"learner_nodes": 1, "rollout_nodes": 1})

    def suggested(fits):
        return suggest(planned, LLAMA_8B, H100, fits)

    assert suggested(lambda recipe: False) == []
    (one,) = suggested(lambda recipe: recipe.learner.distributed_optimizer)
    assert (one.changes, one.nodes) == ({"learner.distributed_optimizer": True}, 2)
    (full,) = suggested(lambda r: r.learner.megatron.get("recompute_granularity") == "full")
    assert full.changes["learner.megatron.recompute_method"] == "uniform"
    (budget,) = suggested(lambda recipe: recipe.learner.micro_batch_tokens <= 8192)
    assert budget.changes == {"learner.micro_batch_tokens": 8192}
    (more,) = suggested(lambda recipe: recipe.learner.ranks >= 16)
    assert (more.changes, more.nodes) == ({"learner.ranks": 16, "slurm.learner_nodes": 2}, 3)
    servers, *_ = suggested(lambda recipe: recipe.rollout.tensor_parallel > 1)
    assert servers.changes == {"rollout.tensor_parallel": 2, "rollout.servers": 4}
    (tmp_path / "recipe.yaml").write_text(planned.to_yaml())
    for each in (one, full, budget, more, servers):
        settings = [f"{key}={value}" for key, value in each.changes.items()]
        assert load(tmp_path / "recipe.yaml", settings) != planned


def test_what_packing_is_worth():
    """Sequences of one length need none; where lengths vary rows are padded, and in far more shapes."""
    recipe = load(RECIPES / "moe/qwen3-30b-a3b-dapo-fp16-8n8g.yaml")
    varied = packing(recipe, 500, 2000, 8192)
    assert 0 < varied.packed.share < 0.01 < varied.rows.share < 0.15
    equal = packing(recipe, 24, 1000, 1000)  # 1,024 of the multiple of 256, 20 of them of 20,480
    assert equal.rows.share == equal.packed.share == 0
    assert equal.rows.shapes <= 2
    # An fp32 head's own time is of the responses alone, which are not padded.
    settings = ["learner.packing=false", "precision.head=null"]
    slow = load(RECIPES / "dense/qwen3-8b-dapo-fp16-2n8g.yaml", settings)
    fast = slow.model_copy(update={"learner": slow.learner.model_copy(update={"packing": True})})
    shape = shape_config(str(RECIPES / "models/qwen3-8b-base.json"))
    one, other = (times.estimate(r, shape, H100) for r in (slow, fast))
    worth = (1 - one.packing.packed.share) / (1 - one.packing.rows.share)
    assert one.update_s == pytest.approx(other.update_s * worth)
    assert worth > 1.02
