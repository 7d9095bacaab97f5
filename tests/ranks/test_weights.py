"""Conversion between Hugging Face and Megatron: exact, in both directions, at every layout."""

import json
import math
import re
import shutil
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp16rl.models import layouts
from megatron_fp16rl.models.families import FAMILIES
from megatron_fp16rl.models.folder import HFFolder, write_folder
from megatron_fp16rl.models.spec import check_served, describe
from megatron_fp16rl.recipe import Layout, RecipeError
from megatron_fp16rl.rollout.weight_sync.broadcast import buckets
from tests import models
from tests.conftest import run_ranks


@given(
    ranks=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([4, 8]),
    queries=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6]),
    vocabulary=st.integers(5, 23),
)
@settings(max_examples=40, deadline=None)
def test_layouts_round_trip(ranks, groups, queries, head_dim, vocabulary):
    heads, hidden = groups * queries, 5
    padded = -(-vocabulary // ranks) * ranks
    shapes = layouts.Shapes(heads, groups, head_dim, vocabulary, padded)
    rows = [heads * head_dim, groups * head_dim, groups * head_dim]
    cases = [
        (layouts.Replicated(), [torch.randn(hidden)]),
        (layouts.Cut(0), [torch.randn(8, hidden)]),
        (layouts.Cut(1), [torch.randn(hidden, 8)]),
        (layouts.GatedRows(), [torch.randn(8, hidden), torch.randn(8, hidden)]),
        (layouts.Vocabulary(), [torch.randn(vocabulary, hidden)]),
        (layouts.QueryKeyValue(), [torch.randn(n, hidden) for n in rows]),
        (layouts.QueryKeyValue(), [torch.randn(n) for n in rows]),
    ]
    for layout, tensors in cases:
        shards = layout.split(tensors, ranks, shapes)
        assert len(shards) == ranks
        assert len({s.shape for s in shards}) == 1
        joined = layout.join(shards, shapes)
        assert all(torch.equal(a, b) for a, b in zip(joined, tensors, strict=True)), layout


def test_transformer_engine_names_read_as_local_ones():
    family = FAMILIES["qwen3"]
    assert (
        family.find("decoder.layers.7.self_attention.linear_qkv.layer_norm_weight").hf
        == family.find("decoder.layers.7.input_layernorm.weight").hf
        == ("model.layers.7.input_layernorm.weight",)
    )
    assert family.find("decoder.layers.0.mlp.linear_fc1.layer_norm_weight").hf == (
        "model.layers.0.post_attention_layernorm.weight",
    )
    experts = FAMILIES["qwen3_moe"]
    assert experts.find("decoder.layers.3.mlp.experts.linear_fc2.weight11").hf == (
        "model.layers.3.mlp.experts.11.down_proj.weight",
    )
    latent = FAMILIES["deepseek_v3"]
    for projection, norm in (("linear_q_up_proj", "q_a"), ("linear_kv_up_proj", "kv_a")):
        name = f"decoder.layers.4.self_attention.{projection}.layer_norm_weight"
        assert latent.find(name).hf == (f"model.layers.4.self_attn.{norm}_layernorm.weight",)
    with pytest.raises(KeyError, match="linear_typo"):
        family.find("decoder.layers.0.mlp.linear_typo.weight")


ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
FP8 = {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("qwen3", "attention_bias", True, "attention_bias"),
        ("qwen3", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("qwen3", "rope_parameters", YARN, "rope_type='yarn'"),
        ("deepseek-v3", "attention_bias", True, "attention_bias"),
        ("deepseek-v3", "norm_topk_prob", False, "norm_topk_prob=false"),
        ("deepseek-v3", "topk_group", 3, "topk_group other than half of num_experts_per_tok"),
        ("deepseek-v3", "rope_interleave", False, "rope_interleave=false"),
        ("deepseek-v3", "rms_norm_eps", 1e-5, "rms_norm_eps other than 1e-6"),
        ("deepseek-v3", "num_key_value_heads", 2, "other than num_attention_heads"),
        ("deepseek-v3", "topk_method", "greedy", "topk_method other than noaux_tc"),
        ("deepseek-v3", "quantization_config", FP8, "quantization_config.*to bf16 or fp16"),
        ("deepseek-v3", "rope_parameters", models.LLAMA3_ROPE, "'llama3'.*'default', 'yarn'"),
        ("deepseek-v3", "rope_parameters", {**models.YARN, "truncate": False}, "truncate=False"),
        (
            *("deepseek-v3", "rope_parameters", {**models.YARN, "mscale_all_dim": 0}),
            "mscale_all_dim=0.0: give both",
        ),
        ("glm4-moe-lite", "mlp_layer_types", ["sparse", "dense"], "dense layers, then sparse ones"),
        ("glm4-moe-lite", "first_k_dense_replace", 2, "other than mlp_layer_types has"),
        (
            *("glm4-moe-lite", "rope_parameters", {**ROPE, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor other than 1",
        ),
    ],
)
def test_models_that_would_be_misread_are_refused(family, key, value, message):
    from transformers import AutoConfig

    options = {**models.tiny.EVERY[family], key: value}
    config = AutoConfig.for_model(options.pop("model_type"), vocab_size=99, **options)
    with pytest.raises(RecipeError, match=message):
        describe(config, Layout())


def test_layers_of_multi_token_prediction_are_left_out(tmp_path):
    folders = []
    for layer in (2, 3):  # the first after the last, and one that the configuration does not know
        folder = tmp_path / str(layer)
        models.hf_model(models.DEEPSEEK_V3, folder)
        assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
        spare = {f"model.layers.{layer}.eh_proj.weight": torch.ones(1)}
        models.edit_tensors(folder, lambda tensors, spare=spare: tensors.update(spare))
        folders.append(str(folder))
    said = run_ranks(1, "weights.load_errors", folders=folders)[0]
    assert said[0] == "loaded without a word"
    assert "takes model.layers.3.eh_proj.weight" in said[1]


def test_the_expert_bias_stays_fp32_in_an_fp16_learner(tmp_path):
    models.hf_model({**models.DEEPSEEK_V3, "first_k_dense_replace": 0}, tmp_path)
    on_disk, rates = HFFolder(tmp_path), [0.0, 0.25]
    results, _ = run_ranks(
        2, "weights.expert_bias", folder=str(tmp_path), layout={"pipeline_parallel": 2}, rates=rates
    )
    for rate, result in zip(rates, results, strict=True):
        assert result["stepped"]
        before, after = torch.load(result["file"])
        assert sorted(before) == sorted(after) == on_disk.names()
        biases = [name for name in before if name.endswith("e_score_correction_bias")]
        assert len(biases) == 2
        for name, tensor in before.items():
            original = on_disk.read(name)
            assert torch.equal(tensor, original if name in biases else original.half()), name
        for name in biases:
            assert before[name].dtype == after[name].dtype == torch.float32
            assert not torch.equal(before[name], before[name].half().float()), "fp16 would do"
            moved = (after[name] - before[name]).abs().max()
            assert moved == pytest.approx(rate), "Megatron's own balancing, if it is asked for"
        differing = sum((before[name] != after[name]).sum().item() for name in before)
        share = differing / sum(tensor.numel() for tensor in before.values())
        assert result["changed"] == pytest.approx(share)
        assert result["unchanged"] == 0 < share < 1
        assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_buckets_keep_together_what_servers_fuse_and_fp32_what_they_keep():
    names = ["a.mlp.gate.e_score_correction_bias", "a.self_attn.q_a_proj.weight"]
    names += ["a.self_attn.q_b_proj.weight", "a.self_attn.kv_a_proj_with_mqa.weight", "b", "c"]
    stream = ((name, torch.ones(8)) for name in names)
    fused = FAMILIES["deepseek_v3"].fused_by_sglang
    sent = list(buckets(stream, 16, torch.float16, fused))
    assert [[name for name, _ in bucket] for bucket, _ in sent] == [
        names[:1],
        names[1:4],
        names[4:5],
        names[5:],
    ]
    assert [is_last for _, is_last in sent] == [False, False, False, True]
    dtypes = [tensor.dtype for bucket, _ in sent for _, tensor in bucket]
    assert dtypes == [torch.float32] + [torch.float16] * 5


# By value of one number, what is said of its tensor.
SPOILT = {
    torch.nan: "holds NaN: the file is damaged",
    torch.inf: "holds an infinity",
    1e5: "reaches 100000.*precision: bf16",
}


@pytest.mark.parametrize(
    ("axis", "config", "is_on_both", "spoilt"),
    [
        (
            "tensor_parallel",
            models.QWEN3,
            lambda name: "norm" in name,
            "embed_tokens.weight 0.self_attn.k_proj.weight 1.mlp.down_proj.weight model.norm.weight",
        ),
        (
            "expert_parallel",
            models.QWEN3_MOE,
            lambda name: ".experts." not in name,
            "0.mlp.experts.7.up_proj.weight 1.mlp.experts.0.down_proj.weight model.norm.weight",
        ),
        (
            "pipeline_parallel",
            models.QWEN3,
            lambda name: "embed_tokens" in name,  # tied: the last stage has a copy
            "0.input_layernorm.weight model.norm.weight",
        ),
    ],
)
def test_ranks_read_their_own_slices_and_every_number_is_looked_at(
    tmp_path, axis, config, is_on_both, spoilt
):
    """The last number of a tensor is in one rank's slice: all ranks say what that one saw."""
    layout = {axis: 2}
    models.hf_model(config, tmp_path / "good")
    read = run_ranks(2, "weights.loaded", folder=str(tmp_path / "good"), layout=layout)
    entries = HFFolder(tmp_path / "good").entries
    sizes = {name: 4 * math.prod(entry.shape) for name, entry in entries.items()}
    whole, both = sum(sizes.values()), sum(sizes[name] for name in sizes if is_on_both(name))
    assert sum(read) == whole + both
    if axis != "expert_parallel":
        assert max(read) < 0.7 * whole
    folders, patterns = [], []
    for tensor, (value, said) in zip(spoilt.split(), cycle(SPOILT.items())):
        (name,) = (name for name in sizes if name.endswith(tensor))
        folder = tmp_path / tensor
        shutil.copytree(tmp_path / "good", folder)

        def spoil(tensors, name=name, value=value):
            tensors[name].view(-1)[-1] = value

        models.edit_tensors(folder, spoil)
        folders.append(str(folder))
        patterns.append(f"{name} {said}")
    for sentences in run_ranks(2, "weights.load_errors", folders=folders, layout=layout):
        for sentence, pattern in zip(sentences, patterns, strict=True):
            assert re.search(pattern, sentence), sentence


def test_sharded_folders_read_back(tmp_path, monkeypatch):
    models.hf_model(models.QWEN3, tmp_path / "whole")
    whole = HFFolder(tmp_path / "whole")
    monkeypatch.setattr("megatron_fp16rl.models.folder._SHARD_BYTES", 50_000)
    tensors = ((name, whole.read(name).half()) for name in whole.names())
    write_folder(tmp_path / "sharded", tmp_path / "whole", "float16", tensors)
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 1
    sharded = HFFolder(tmp_path / "sharded")
    assert sharded.names() == whole.names()
    assert all(torch.equal(sharded.read(n), whole.read(n).half()) for n in whole.names())
    assert json.loads((tmp_path / "sharded" / "config.json").read_text())["dtype"] == "float16"


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    models.hf_model(models.QWEN3, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def breaks_off():
        yield "model.norm.weight", torch.ones(64)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "model", tmp_path / "model", "float32", breaks_off())
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3-moe", {"mlp_only_layers": [0]}, "every layer of a qwen3_moe model for sparse"),
        ("qwen3-moe", {"tie_word_embeddings": True}, "of a tied qwen3_moe model unset; untie it"),
        ("glm4-moe", {"tie_word_embeddings": True}, "of a tied glm4_moe model unset; untie it"),
        ("glm4-moe-lite", {"tie_word_embeddings": True}, "of a tied glm4_moe_lite model unset"),
        ("gpt-oss", {"tie_word_embeddings": True}, "of a tied gpt_oss model unset"),
        ("glm4-moe-lite", {"first_k_dense_replace": None}, 'add "first_k_dense_replace": 1'),
    ],
)
def test_models_that_sglang_would_serve_wrongly_are_refused(family, changes, message):
    from transformers import AutoConfig

    config = AutoConfig.for_model(**{**models.MOE_FAMILIES[family], "tie_word_embeddings": False})
    check_served(config)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(RecipeError, match=message):
        check_served(config)


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ({"tensor_parallel": 2}, "qwen3"),
        ({"pipeline_parallel": 2}, "qwen3"),
        ({"expert_parallel": 2}, "qwen3-moe"),
    ],
    ids=["tp2", "pp2", "ep2"],
)
def test_exporting_takes_a_bucket_of_memory_and_a_parameter(layout, family):
    """Not the model: whatever its size, and in the same order every time."""
    bucket = 40_000
    results = run_ranks(2, "weights.export_memory", layout=layout, family=family, bucket=bucket)
    largest = max(result["largest"] for result in results)
    assert results[0]["total"] > 14 * bucket
    assert results[0]["same_order"]
    # A bucket as tensors and as bytes, as much that is gathered, and one parameter: in parts, whole,
    # and under way.
    assert bucket < results[0]["peak"] <= 3 * bucket + 3 * largest
    for result in results[1:]:
        assert result["peak"] <= bucket + 3 * largest
