"""Which attention kernel a learner on a GPU will use, asked of a stand-in for Transformer Engine."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_fp16rl import platform
from megatron_fp16rl.learner.attention import Attention  # before there seems to be TE
from megatron_fp16rl.platform import cpu, cuda
from megatron_fp16rl.recipe import RecipeError
from tests.conftest import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is the real one")


@pytest.fixture
def questions(monkeypatch):
    """What a stand-in for Transformer Engine is asked about its attention kernels."""
    questions = []

    def choose(question):
        questions.append(vars(question))
        fused = question.head_dim_qk <= 128 and question.qkv_dtype is not torch.float32
        fused = fused and question.window_size != (63, 0)
        return False, None, fused, 1 if fused else None, True, [False, fused, True]

    package = "transformer_engine.pytorch.attention.dot_product_attention"
    for depth in range(1, 5):
        name = ".".join(package.split(".")[:depth])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    utils = SimpleNamespace(AttentionParams=SimpleNamespace, get_attention_backend=choose)
    sys.modules[package].utils = utils
    monkeypatch.setattr(cuda, "kernels", lambda: "transformer_engine")
    monkeypatch.setattr(cuda, "describe", lambda: "CUDA, cuDNN 9.10.1")
    monkeypatch.setattr(platform, "current", lambda: cuda)
    return questions


def attention(dtype=torch.float16, packed=True, **config):
    usual = {"tensor_model_parallel_size": 2, "num_attention_heads": 32, "num_query_groups": 8}
    usual |= {"kv_channels": 128, "multi_latent_attention": False}
    usual |= {"context_parallel_size": 1, "cp_comm_type": None}
    usual |= {"window_size": None, "softmax_type": "vanilla"}
    return Attention(SimpleNamespace(**usual | config), dtype, packed)


def test_transformer_engine_is_asked_for_its_attention_kernel(questions):
    grouped = attention()
    assert [grouped.kernel(10_240) for _ in range(2)] == ["fused"] * 2
    (question,) = questions  # once for each length
    asked = {"num_heads": 16, "num_gqa_groups": 4, "head_dim_qk": 128, "head_dim_v": 128}
    asked |= {"max_seqlen_q": 10_240, "max_seqlen_kv": 10_240}
    assert asked.items() <= question.items()
    widths = {"qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
    assert attention(multi_latent_attention=True, **widths).kernel(2048) == "unfused"
    asked = {
        "num_gqa_groups": 16,
        "head_dim_qk": 192,
        "head_dim_v": 192,
    }  # Megatron pads packed values
    assert asked.items() <= questions[-1].items()
    attention(packed=False, multi_latent_attention=True, **widths).kernel(2048)
    assert questions[-1]["head_dim_v"] == 128
    layouts = {"qkv_layout": "thd_thd_thd", "attn_mask_type": "padding_causal"}
    assert layouts.items() <= question.items()
    attention(packed=False, context_parallel_size=2).kernel(512)
    rows = {"qkv_layout": "sbhd_sbhd_sbhd", "attn_mask_type": "causal"}
    rows |= {"context_parallel": True, "cp_comm_type": "p2p", "cp_size": 2}
    assert rows.items() <= questions[-1].items()


def test_layers_with_windows_and_layers_without_are_asked_for(questions):
    sinks = {"softmax_type": "learnable"}
    assert attention(window_size=(127, 0), **sinks).kernel(2048) == "fused"
    assert {question["window_size"] for question in questions} == {(-1, 0), (127, 0)}
    assert {question["softmax_type"] for question in questions} == {"learnable"}
    assert attention(window_size=(63, 0), **sinks).kernel(2048) == "unfused"


def test_long_sequences_without_fused_attention_are_refused(questions, monkeypatch):
    message = r"2,304 x 2,304 scores .* cuDNN 9.10.1\. Remedy: .*NVTE_D"
    with pytest.raises(RecipeError, match=message):
        attention(torch.float32).kernel(2304)
    monkeypatch.setattr(cuda, "kernels", lambda: "torch")  # not TE
    assert attention().kernel(2049) == "torch"
    with pytest.raises(RecipeError, match="context_parallel=2 needs Transformer Engine on GPUs"):
        attention(context_parallel_size=2).kernel(512)
    monkeypatch.setattr(platform, "current", lambda: cpu)
    assert attention().kernel(1 << 20) is None
    assert run_ranks(1, "precision.too_long")[0] == ["learner", "batch"]
