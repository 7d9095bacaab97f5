"""The servers' memory, against what SGLang itself makes of models and GPUs that are not there."""

import dataclasses
import json
import subprocess
import sys
import typing

import pytest
from transformers import AutoConfig

from megatron_fp16rl.recipe import Gpu
from megatron_fp16rl.tools.plan.arithmetic import costs
from megatron_fp16rl.tools.plan.decoding import Servers, decode_step
from megatron_fp16rl.tools.plan.gpus import GPUS
from megatron_fp16rl.tools.plan.rates import SHIPPED
from megatron_fp16rl.tools.plan.servers import (
    admitted,
    admitted_experts,
    padded_vocabulary,
    refusal,
    server_memory,
    static_fraction,
    token_bytes,
    weight_bytes,
)
from tests import models

H100 = GPUS["h100-80gb"]
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
SHAPES = [  # more ranks than kv heads among them, experts cut and spread, a vocabulary to be padded
    ("qwen2", 4, 1),
    ("qwen3-tied", 2, 1),
    ("llama", 4, 1),
    ("qwen3-moe-untied", 4, 4),
    ("qwen2-moe-untied", 2, 1),
    ("glm4-moe", 4, 2),
    ("deepseek-v3", 2, 1),
    ("deepseek-v3", 4, 4),
]
FRACTIONS = [
    (name, parts, gpu)
    for name in ("qwen3", "deepseek-v3")
    for parts in (1, 4, 16)
    for gpu in GPUS.values()
]


def shape(name: str) -> dict:
    untied = {"tie_word_embeddings": False} if name.endswith("-untied") else {}
    known = {**models.FAMILIES, **models.MOE_FAMILIES}
    return {**known[name.removesuffix("-untied")], "vocab_size": 97, **untied}


def config(values: dict) -> object:
    return AutoConfig.for_model(**values)


def recipe(servers: dict | None = None, sglang: dict | None = None, **more) -> object:
    rollout = {"prompts": 8, "samples": 8, "max_new_tokens": 4090, **(servers or {})}
    return models.recipe(rollout={**rollout, "sglang": sglang or {}}, **more)


@pytest.fixture(scope="module")
def sglang() -> dict[str, list[float]]:
    asked = {
        "shapes": [[shape(name), parts, experts] for name, parts, experts in SHAPES],
        "fractions": [[shape(name), parts, gpu.total_mib] for name, parts, gpu in FRACTIONS],
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.sglang_shapes"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_weights_of_a_rank_are_those_of_sglangs_own_models(sglang):
    for (name, parts, experts), found in zip(SHAPES, sglang["shapes"], strict=True):
        model = costs(config(shape(name)))
        # Made when weights are loaded, so not there yet: kv_b_proj in the shape of decoding.
        absorbed = 2 * model.layers * model.attention.up_kv // parts
        assert weight_bytes(model, parts, 2) - absorbed == found, (name, parts, experts)


def test_a_rank_reads_all_of_its_weights_but_the_embedding_to_decode(sglang):
    """Where the batch chooses every expert. What SGLang repeats on each rank, each reads."""
    slow = dataclasses.replace(H100, hbm_gbps=1e-9)  # a byte a second: nothing else takes long
    for (name, parts, _), found in zip(SHAPES, sglang["shapes"], strict=True):
        model = costs(config(shape(name)))
        table = 0 if model.tied else padded_vocabulary(97, parts) // parts * model.hidden * 2
        servers = Servers(1, parts, 10**6, 10**6, 0)
        rates = dataclasses.replace(SHIPPED, memory=1.0)
        seconds = decode_step(model, servers, 10**5, 0, 2, slow, rates)
        assert seconds == pytest.approx(found - table, abs=1), (name, parts)


def test_the_static_share_of_memory_is_the_one_that_sglang_chooses(sglang):
    for (name, parts, gpu), found in zip(FRACTIONS, sglang["fractions"], strict=True):
        ours = static_fraction(gpu, parts, latent=name == "deepseek-v3")
        assert ours == pytest.approx(found, abs=1e-9), (name, parts, gpu.name)


def test_cache_of_a_token():
    grouped = costs(config(QWEN3_30B))
    # 48 layers, keys and values of 128 numbers in 2 bytes, of 4, 2, 1 heads a rank; then replicas
    assert [token_bytes(grouped, parts, 2) for parts in (1, 2, 4, 8)] == [
        98304,
        49152,
        24576,
        24576,
    ]
    latent = costs(config({"model_type": "deepseek_v3"}))
    # 61 layers of 512 + 64 numbers, whole on every rank
    assert [token_bytes(latent, parts, 2) for parts in (1, 8, 32)] == [70272] * 3


def test_sequences_that_a_server_holds():
    model = config(QWEN3_30B)
    found = server_memory(recipe({"tensor_parallel": 2}), model, H100)
    assert found.reasons == []
    assert found.weights == pytest.approx(30.5e9, rel=0.01)  # 30.5e9 parameters, 2 bytes, 2 ranks
    assert found.kv_tokens == (found.kv_cache // 49152)
    assert found.running == found.kv_tokens // (6 + 4090)  # 2-digit additions: prompts of 6
    assert found.wanted == 64
    capped = server_memory(
        recipe({"tensor_parallel": 2}, {"max-total-tokens": 10000, "max_running_requests": 5}),
        model,
        H100,
    )
    assert (capped.kv_tokens, capped.max_running, capped.running) == (10000, 5, 2)
    half = server_memory(recipe({"tensor_parallel": 2}, {"mem_fraction_static": 0.5}), model, H100)
    assert half.static_fraction == 0.5
    assert half.kv_tokens < found.kv_tokens


def test_weights_that_leave_no_room_are_a_reason():
    found = server_memory(recipe(), config({**QWEN3_30B, "num_hidden_layers": 72}), H100)
    assert not found.fits
    (reason,) = found.reasons
    assert "rollout.tensor_parallel" in reason
    assert "longest sequence has 4096" in reason
    assert server_memory(recipe({"tensor_parallel": 2}), config(QWEN3_30B), H100).fits


def test_what_sglang_refuses_is_refused_with_its_reason():
    model = config(QWEN3_30B)
    assert refusal(recipe({"tensor_parallel": 4}), model) is None
    assert refusal(recipe({"tensor_parallel": 4}, {"ep_size": 4}), model) is None
    assert "num_attention_heads=32" in refusal(recipe({"tensor_parallel": 3}), model)
    assert "ep_size=3" in refusal(recipe({"tensor_parallel": 4}, {"ep-size": 3}), model)
    dense = config(shape("qwen3"))
    assert "no experts" in refusal(recipe({"tensor_parallel": 2}, {"ep": 2}), dense)
    assert admitted(model) == [1, 2, 4, 8, 16, 32]
    assert admitted_experts(model, 8) == [1, 2, 4, 8]
    assert admitted_experts(dense, 4) == [1]
    # 12 heads and 4 of keys and values: 3 ranks can share the first, not the second
    odd = config(
        {
            **shape("qwen3"),
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
        }
    )
    assert admitted(odd) == [1, 2, 4, 12]
    assert padded_vocabulary(97, 1) == 128
    assert padded_vocabulary(97, 3) == 192


def test_every_gpu_of_a_recipe_is_known():
    assert set(GPUS) == set(typing.get_args(Gpu))
    for gpu in GPUS.values():  # what a driver keeps for itself is a percent or two
        assert 0.95 * gpu.total_mib < 1024 * gpu.memory_gib < gpu.total_mib
