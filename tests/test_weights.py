"""Conversion between Hugging Face and Megatron: exact, in both directions, at every layout."""

import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_fp16rl.recipe import Layout
from megatron_fp16rl.weights import families, layouts
from megatron_fp16rl.weights.folder import HFFolder, write_folder
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
    family = families.FAMILIES["qwen3"]
    assert (
        family.find("decoder.layers.7.self_attention.linear_qkv.layer_norm_weight").hf
        == family.find("decoder.layers.7.input_layernorm.weight").hf
        == ("model.layers.7.input_layernorm.weight",)
    )
    assert family.find("decoder.layers.0.mlp.linear_fc1.layer_norm_weight").hf == (
        "model.layers.0.post_attention_layernorm.weight",
    )
    experts = families.FAMILIES["qwen3_moe"]
    assert experts.find("decoder.layers.3.mlp.experts.linear_fc2.weight11").hf == (
        "model.layers.3.mlp.experts.11.down_proj.weight",
    )
    with pytest.raises(KeyError, match="linear_typo"):
        family.find("decoder.layers.0.mlp.linear_typo.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2.*supported: llama, qwen2, qwen3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type='yarn'",
        ),
    ],
)
def test_models_that_would_be_misread_are_refused(change, message):
    from transformers import AutoConfig

    options = {**models.FAMILIES["qwen3"], **change}
    if options["model_type"] == "gpt2":
        options = {"model_type": "gpt2"}
    config = AutoConfig.for_model(options.pop("model_type"), vocab_size=99, **options)
    with pytest.raises(ValueError, match=message):
        families.describe(config, Layout())


def test_folders_that_do_not_fit_are_refused(tmp_path):
    models.hf_model(models.QWEN3, tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "model.safetensors")
    cases = (
        (lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "no parameter .* takes model.extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"a shard of \(3,\).*\(64,\)"),
        (
            lambda t: t["model.norm.weight"].fill_(1e5),
            "norm.weight reaches 100000.*precision: bf16",
        ),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm.weight reaches nan"),
    )
    folders = []
    for number, (change, _) in enumerate(cases):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        change(changed)
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(tmp_path / "good" / "config.json", folder)
        folders.append(str(folder))
    said = run_ranks(1, "load_errors", folders=folders)[0]
    for sentence, (_, pattern) in zip(said, cases, strict=True):
        assert re.search(pattern, sentence), sentence


def test_sharded_folders_read_back(tmp_path, monkeypatch):
    models.hf_model(models.QWEN3, tmp_path / "whole")
    whole = HFFolder(tmp_path / "whole")
    monkeypatch.setattr("megatron_fp16rl.weights.folder._SHARD_BYTES", 50_000)
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
