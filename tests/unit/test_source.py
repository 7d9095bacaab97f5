"""A recipe's model is located, and never planned or trained as another model."""

import json
import re
import shutil

import pytest

from megatron_fp16rl.models.build import model_config, model_folder
from megatron_fp16rl.recipe import Model, RecipeError, load
from megatron_fp16rl.tools import recipes
from megatron_fp16rl.tools.plan import checks
from megatron_fp16rl.utils.files import write_json
from tests import models
from tests.runs import fp16rl

SHAPES = recipes.RECIPES / "models"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Adds models to a hub cache as `hf download` lays it out: a link for each file to its blob."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, folder):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "0a1b2c"
        for part in (snapshot, repository / "refs", repository / "blobs"):
            part.mkdir(parents=True)
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
    write_json(folder / "config.json", models.QWEN3)
    index = {"weight_map": {f"tensor.{i}": shard for i, shard in enumerate(shards)}}
    write_json(folder / "model.safetensors.index.json", index)
    (folder / shards[2]).touch()
    with pytest.raises(RecipeError, match=r"model-0-.*, model-1-.*, model-3-.* and 1 more"):
        model_folder(Model(path=str(folder)))


def test_every_shape_is_of_the_model_that_recipes_name():
    named = {path: json.loads(path.read_text())["_name_or_path"] for path in SHAPES.glob("*.json")}
    for path in recipes.paths():
        model = load(path).model
        if model.shape is None or model.path.endswith("-bf16"):  # converted
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

    def lines_about(*overrides):
        recipe = load(path, overrides)
        lines = checks.warnings(recipe, model_config(recipe.model), step_s=1.0)
        return [line for line in lines if "is not here" in line]

    assert lines_about() == []
    (line,) = lines_about("model.path=/far/away")
    assert line.startswith("model.path=/far/away is not here: it is planned as Qwen/Qwen3-8B-Base")
    assert lines_about(f"model.path={small}", "model.shape=null") == []


def test_a_fork_for_a_model_that_is_here_has_its_shape(cache, small, tmp_path):
    cache("Qwen/Qwen3-32B", small)
    fork = tmp_path / "far" / "mine.yaml"
    fork.parent.mkdir()
    arguments = ["--from", "qwen3-8b-dapo-fp16-2n8g", "--set", "model.path=Qwen/Qwen3-32B"]
    fp16rl("recipes", "new", fork, *arguments)
    assert load(fork).model.shape is None
    assert model_config(load(fork).model).hidden_size == models.QWEN3["hidden_size"]
