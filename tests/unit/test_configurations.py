"""A config.json written by others: planned, or refused by file and key."""

import contextlib
import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.models.build import built_config, built_tokenizer, model_config
from megatron_fp16rl.models.check import parameters
from megatron_fp16rl.models.config import config_of
from megatron_fp16rl.models.spec import check_served
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import BuildModel, Model, RecipeError, load
from megatron_fp16rl.tools.plan import checks
from megatron_fp16rl.tools.plan.gpus import gpu_of
from megatron_fp16rl.tools.plan.servers import server_memory
from megatron_fp16rl.tools.plan.submission import plan_of
from megatron_fp16rl.tools.plan.times import estimate
from megatron_fp16rl.tools.selftest import models as tiny
from tests import models

TINY = "recipes/tiny/dense-grpo-fp16.yaml"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"


def _configuration(values):
    options = {"vocab_size": 99, **values}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    return json.loads(config.to_json_string(use_diff=False))


_FAMILIES = {**models.FAMILIES, **models.MOE_FAMILIES}
CONFIGURATIONS = {name: _configuration(values) for name, values in _FAMILIES.items()}
_NUMBERS = [0, 1, -1, 3, 7, 2**40, 10**9, 10**30, 0.5, 1e308, float("inf"), float("nan")]
_OTHERS = ["", "many", "64", [], [1], [None], {}, {"rope_type": "yarn"}, "float8_e4m3fn"]
JUNK = st.sampled_from([None, True, False, *_NUMBERS, *_OTHERS])


@st.composite
def damaged(draw):
    """A config.json of a family, with one to three keys gone or of another value."""
    values = copy.deepcopy(CONFIGURATIONS[draw(st.sampled_from(sorted(CONFIGURATIONS)))])
    for _ in range(draw(st.integers(1, 3))):
        where = values
        key = draw(st.sampled_from(sorted(where)))
        if isinstance(where[key], dict) and where[key] and draw(st.booleans()):
            where = where[key]
            key = draw(st.sampled_from(sorted(where)))
        if draw(st.integers(0, 5)):
            where[key] = copy.deepcopy(draw(JUNK))
        else:
            del where[key]
    return values


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(damaged())
def test_a_damaged_configuration_is_planned_or_refused_by_file_and_key(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    recipe = models.recipe()
    try:
        config = model_config(Model(path=str(tmp_path)))
    except RecipeError as error:
        if not str(error).startswith(str(tmp_path / "config.json")):
            raise
        return
    gpu = gpu_of("h100-80gb", recipe)
    for plan in (
        lambda: server_memory(recipe, config, gpu),
        lambda: checks.errors(recipe, config),
        lambda: checks.warnings(recipe, config, 1.0),
        lambda: estimate(recipe, config, gpu, None),
        lambda: parameters(config),
        lambda: check_served(config),
    ):
        with contextlib.suppress(RecipeError):
            plan()


def of(model_type="qwen3", **keys):
    return json.dumps({"model_type": model_type, **keys})


IN_TURNS = ["full_attention", "linear_attention"] * 24
ROPE = {"rope_theta": 1e4, "partial_rotary_factor": 2}
DAMAGED = {
    "cannot be read: .* an object": "[]",
    "is a Git LFS pointer": POINTER,
    "cannot be read: it is nested too deeply": "[" * 10**5,
    "not supported: Qwen3.5's tensors are inside a vision model's": of("qwen3_5"),
    "layer_types other than .* in every n-th layer": of("qwen3_next", layer_types=IN_TURNS),
    "linear_num_key_heads=3 does not divide .*=32": of("qwen3_next", linear_num_key_heads=3),
    'num_hidden_layers="many" must be': of(num_hidden_layers="many"),
    'hidden_size="64" must be a whole number': of(hidden_size="64"),
    "torch_dtype=.*not supported": of(torch_dtype="float8_e4m3fn"),
    "layer_types: sliding_attention is not supported": of(
        num_hidden_layers=1, layer_types=["sliding_attention"]
    ),
    "num_key_value_heads=4 does not divide num_attention_heads=6": of(
        num_attention_heads=6, num_key_value_heads=4
    ),
    "num_attention_heads=32 does not divide hidden_size=100": of(
        "qwen2", num_attention_heads=32, hidden_size=100
    ),
    "num_experts_per_tok=9 is more than the 8 experts": of(
        "qwen3_moe", num_experts=8, num_experts_per_tok=9
    ),
    "n_group=7 must divide the 256 experts": of("deepseek_v3", n_group=7),
    "partial_rotary_factor must be above 0 and at most 1": of(rope_parameters=ROPE),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_configuration_is_refused_by_file_and_key(message, tmp_path):
    (tmp_path / "config.json").write_text(DAMAGED[message])
    with pytest.raises(RecipeError, match=f"config.json:? .*{message}"):
        model_config(Model(path=str(tmp_path)))


def test_shapes_and_models_to_be_built_are_checked_alike(tmp_path):
    (tmp_path / "shape.json").write_text('{"model_type": "qwen3", "hidden_size": 1.5}')
    far = Model(path="far/away", shape=str(tmp_path / "shape.json"))
    with pytest.raises(RecipeError, match=r"model.shape = .*shape.json': hidden_size=1.5 must be"):
        model_config(far)
    with pytest.raises(RecipeError, match=r"hidden_size=1.5 must be"):  # not that it is not here
        plan_of(models.recipe().model_copy(update={"model": far}))
    for key, message in (
        ({"hidden_size": 0}, "model.build.config: hidden_size=0 must be"),
        ({"vocab_size": 7}, "model.build.config.vocab_size follows from"),
    ):
        build = {"alphabet": "01", "config": {**models.QWEN3, **key}}
        with pytest.raises(RecipeError, match=message):
            model_config(Model(build=build))
    assert config_of(models.QWEN3, "here").hidden_size == 64


def test_only_a_missing_model_may_be_submitted_without_a_plan(tmp_path, monkeypatch):
    """A damaged one may not: jobs would queue for it without a plan."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sets = ["model.build=null", "warm_start=null", "model.path="]
    assert plan_of(load(TINY, [*sets[:2], f"{sets[2]}nobody/nothing"])) is None
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "64"}')
    damaged = [*sets[:2], f"{sets[2]}{tmp_path}"]
    with pytest.raises(RecipeError, match="hidden_size"):
        plan_of(load(TINY, damaged))
    done = CliRunner().invoke(app, ["plan", TINY, *(f"--set={setting}" for setting in damaged)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {tmp_path}/config.json: hidden_size")


@pytest.mark.parametrize("family", tiny.EVERY)
def test_a_built_tokenizer_is_read_back_as_it_was_made(family, tmp_path):
    """transformers takes another class for some families, whatever the folder says."""
    alphabet = "01 +=é\n" if family != "qwen2" else "01+=~"
    build = BuildModel(config=tiny.EVERY[family], alphabet=alphabet)
    built_config(build).save_pretrained(tmp_path)
    built_tokenizer(build).save_pretrained(tmp_path)
    read = load_tokenizer(tmp_path)
    ids = list(range(2, 2 + len(alphabet)))
    assert len(read) == 2 + len(alphabet)
    assert read.encode(alphabet, add_special_tokens=False) == ids
    assert read.decode(ids) == alphabet


@pytest.mark.parametrize("lost", [" ", "é", "\n"])
def test_what_a_qwen2_tokenizer_would_lose_is_refused(lost):
    build = BuildModel(config=tiny.EVERY["qwen2"], alphabet=f"01{lost}")
    with pytest.raises(RecipeError, match=f"model.build.alphabet has {re.escape(repr(lost))}"):
        built_config(build)
