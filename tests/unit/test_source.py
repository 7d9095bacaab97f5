"""A recipe's model is found, and never planned or trained as another model."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.models.build import model_config, model_folder
from megatron_fp16rl.recipe import Model, RecipeError, load
from megatron_fp16rl.tools import recipes
from megatron_fp16rl.tools.plan import checks
from tests import models

SHAPES = recipes.RECIPES / "models"
# As it is published (config.json of meta-llama/Llama-3.1-70B-Instruct), in the words of transformers 4.
LLAMA_70B = {
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
# The same of deepseek-ai/DeepSeek-V3, after its weights were converted: without quantization_config.
DEEPSEEK_V3 = {
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
RELEASED = {"llama-3.1-70b-instruct": LLAMA_70B, "deepseek-v3": DEEPSEEK_V3}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Adds models to a hub cache as `hf download` lays it out: a link for each file to its blob."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, folder):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "0a1b2c"
        for made in (snapshot, repository / "refs", repository / "blobs"):
            made.mkdir(parents=True)
        (repository / "refs" / "main").write_text("0a1b2c")
        for file in folder.iterdir():
            shutil.copy(file, repository / "blobs" / file.name)
            (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
        return snapshot

    return add


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    models.hf_model(models.QWEN3, folder)
    return folder


def write(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_name_is_looked_up_in_the_cache_of_the_hub(cache, small):
    named = Model(path="me/small")
    with pytest.raises(RecipeError, match=r"nor a model of .* in the hub's cache.* hf download"):
        model_folder(named)
    snapshot = cache("me/small", small)
    assert model_folder(named) == snapshot
    assert model_config(named).hidden_size == models.QWEN3["hidden_size"]
    assert model_folder(Model(path=str(small))) == small.resolve()


def test_a_model_whose_download_was_cut_short_is_refused(cache, small, tmp_path):
    snapshot = cache("me/small", small)
    (snapshot / "model.safetensors").resolve().unlink()  # a link to nothing is left
    with pytest.raises(RecipeError, match=r"lacks weights: model.safetensors\. Was a download"):
        model_folder(Model(path="me/small"))
    assert model_config(Model(path="me/small")).hidden_size == models.QWEN3["hidden_size"]

    shards = [f"model-{i}-of-5.safetensors" for i in range(5)]
    folder = tmp_path / "shards"
    write(folder, models.QWEN3)
    index = {"weight_map": {f"tensor.{i}": shard for i, shard in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shards[2]).touch()
    with pytest.raises(RecipeError, match=r"model-0-.*, model-1-.*, model-3-.* and 1 more"):
        model_folder(Model(path=str(folder)))


@pytest.mark.parametrize("name", RELEASED)
def test_published_configurations_agree_with_our_shapes(name, tmp_path):
    path = write(tmp_path / "model", RELEASED[name])
    config = model_config(Model(path=path, shape=str(SHAPES / f"{name}.json")))
    assert config.hidden_size == RELEASED[name]["hidden_size"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-3.1-70b-instruct", {"num_hidden_layers": 32}, "num_hidden_layers=32 .* has 80"),
        ("llama-3.1-70b-instruct", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ("llama-3.1-70b-instruct", {"rope_theta": 10000.0}, "rope_parameters=.*'rope_theta': 1000"),
        ("llama-3.1-70b-instruct", {"model_type": "qwen3"}, "model_type='qwen3' .* has 'llama'"),
        ("deepseek-v3", {"n_routed_experts": 384}, "n_routed_experts=384 .* has 256"),
    ],
)
def test_a_model_that_is_not_of_its_shape_is_refused(name, change, message, tmp_path):
    path = write(tmp_path / "model", {**RELEASED[name], **change})
    model = Model(path=path, shape=str(SHAPES / f"{name}.json"))
    (tmp_path / "model" / "model.safetensors").touch()
    for read in (model_config, model_folder):
        with pytest.raises(RecipeError, match=f"{message}.*--set model.shape=null"):
            read(model)
    assert model_folder(Model(path=path)).name == "model"


def test_what_does_not_change_the_weights_may_differ(tmp_path):
    """Another context length, other ids; and a shape that is no longer where it was."""
    change = {"max_position_embeddings": 8192, "eos_token_id": 7, "torch_dtype": "float16"}
    path = write(tmp_path / "model", {**LLAMA_70B, **change})
    for shape in (SHAPES / "llama-3.1-70b-instruct.json", tmp_path / "gone.json"):
        assert model_config(Model(path=path, shape=str(shape))).max_position_embeddings == 8192


def test_every_shape_is_of_the_model_that_recipes_name():
    named = {path: json.loads(path.read_text())["_name_or_path"] for path in SHAPES.glob("*.json")}
    for path in recipes.paths():
        model = load(path).model
        if model.shape is None or model.path == "models/deepseek-v3-bf16":  # converted
            continue
        assert next(name for file, name in named.items() if str(file) == model.shape) == model.path
    assert len(set(named.values())) == len(named)


def test_a_recipe_is_not_planned_as_another_model_of_the_catalogue():
    path = recipes.find("qwen3-8b-dapo-fp16-2n8g")
    with pytest.raises(RecipeError) as error:
        model_config(load(path, ["model.path=Qwen/Qwen3-32B"]).model)
    assert "qwen3-8b-base.json' is that of Qwen/Qwen3-8B-Base" in str(error.value)
    remedy = re.search(r"--set (model\.shape=\S+)", str(error.value))[1]
    config = model_config(load(path, ["model.path=Qwen/Qwen3-32B", remedy]).model)
    assert config.hidden_size == 5120


def test_a_plan_says_what_it_takes_a_model_for_that_is_not_here(small):
    path = recipes.find("qwen3-8b-dapo-fp16-2n8g")

    def said(*overrides):
        recipe = load(path, overrides)
        found = checks.warnings(recipe, model_config(recipe.model), step_s=1.0)
        return [line for line in found if "is not here" in line]

    assert said() == []
    (line,) = said("model.path=/far/away")
    assert line.startswith("model.path=/far/away is not here: it is planned as Qwen/Qwen3-8B-Base")
    assert said(f"model.path={small}", "model.shape=null") == []


def test_a_fork_for_a_model_that_is_here_has_its_shape(cache, small, tmp_path):
    cache("Qwen/Qwen3-32B", small)
    mine = tmp_path / "far" / "mine.yaml"
    mine.parent.mkdir()
    arguments = ["--from", "qwen3-8b-dapo-fp16-2n8g", "--set", "model.path=Qwen/Qwen3-32B"]
    done = CliRunner().invoke(app, ["recipes", "new", str(mine), *arguments])
    assert done.exit_code == 0, done.output
    assert load(mine).model.shape is None
    assert model_config(load(mine).model).hidden_size == models.QWEN3["hidden_size"]
