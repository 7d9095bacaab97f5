"""A recipe, shrunk, is like the large one but for size; the rules that a resumed step must follow."""

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from megatron_fp16rl.data.environments import Transcript
from megatron_fp16rl.data.tasks import make
from megatron_fp16rl.learner.loss_scale import LossScaler
from megatron_fp16rl.metrics.gates import check, judge
from megatron_fp16rl.models.build import built_config, built_tokenizer, model_config
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.families import FAMILIES
from megatron_fp16rl.models.spec import check_served, describe
from megatron_fp16rl.recipe import LossScale, Optimizer, Recipe, RecipeError, load
from megatron_fp16rl.tools import recipes
from megatron_fp16rl.tools.rehearse.resume import adam_fault, scaler_after
from megatron_fp16rl.tools.rehearse.shrink import fold, shrink, write

LARGE = [path for path in recipes.paths() if path.parent.name in ("dense", "moe")]
AXES = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "data_parallel")
DENSE = recipes.find("qwen3-14b-dapo-fp16-4n8g")


def small_of(path, *overrides, ranks=8, folder=Path("/there")):
    full = load(path, overrides)
    return shrink(full, model_config(full.model), ranks, folder)


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_recipe_that_ships_shrinks_with_every_axis_that_it_has(path):
    full, small = load(path), small_of(path)
    learner, config = small.learner, built_config(small.model.build)
    describe(config, learner)
    check_served(config)
    assert learner.ranks <= 8
    for axis in AXES:
        assert (getattr(learner, axis) > 1) == (getattr(full.learner, axis) > 1), axis
    large = model_config(full.model)
    assert config.model_type == large.model_type
    assert config.tie_word_embeddings == large.tie_word_embeddings
    assert small.precision == full.precision
    assert small.rollout.router_replay == full.rollout.router_replay
    for key in ("advantage", "loss", "correction", "kl", "clip_low", "clip_high"):
        assert getattr(small.algorithm, key) == getattr(full.algorithm, key)
    assert Recipe.model_validate(yaml.safe_load(small.to_yaml())) == small


def test_every_family_has_a_tiny_model_to_rehearse_with():
    for name, family in FAMILIES.items():
        config = AutoConfig.for_model(
            name, **{"vocab_size": 99, **next(iter(family.tiny.values()))}
        )
        config.tie_word_embeddings = False
        small = shrink(load(DENSE), config, 1, Path("/there"))
        assert built_config(small.model.build).model_type == name


def test_a_model_that_is_served_in_its_own_dtype_is_written_in_the_servers(tmp_path):
    write(small_of(recipes.find("gpt-oss-20b-grpo-fp16-2n8g"), folder=tmp_path), tmp_path)
    check_served(load_config(tmp_path / "model"), "float16")


def test_few_ranks_keep_the_axes_that_come_first():
    axes = {"tensor_parallel": 4, "pipeline_parallel": 4, "expert_parallel": 8}
    layout = load(DENSE).learner.model_copy(update={"ranks": 32, **axes})
    for ranks, *kept in ((1, 1, 1, 1, 1), (2, 2, 1, 2, 2), (7, 2, 2, 2, 4), (8, 2, 2, 2, 8)):
        values = fold(layout, ranks)
        assert [*(values[axis] for axis in axes), values["ranks"]] == kept


def test_what_is_of_gpus_of_many_chunks_or_of_others_is_left_out():
    recomputed = "recompute_granularity: full, recompute_method: block, recompute_num_layers: 6"
    overlap = "overlap_grad_reduce: true, overlap_param_gather: true, bucket_size: 5000"
    small = small_of(
        DENSE,
        f"learner.megatron={{{recomputed}, moe_permute_fusion: true}}",
        "rollout.sglang={mem_fraction_static: 0.85, context_length: 30000}",
        *("learner.pipeline_parallel=2", "learner.model_chunks=2"),
        f"learner.ddp={{{overlap}, align_param_gather: true}}",
        "trackers=[tensorboard, wandb]",
    )
    assert small.rollout.sglang == {"context_length": 128}
    assert small.learner.megatron["recompute_num_layers"] == 1
    assert "moe_permute_fusion" not in small.learner.megatron
    # Gradients and parameters still overlap, of the one chunk that a stage has.
    assert small.learner.distributed_optimizer
    assert small.learner.ddp["overlap_param_gather"]
    assert "align_param_gather" not in small.learner.ddp
    assert small.trackers == ["tensorboard"]


def test_gates_stay_but_for_those_on_suites():
    """With bounds that a random model keeps; evaluated early enough for a wrong name to be refused."""
    gates = "gates=[{metric: mismatch/kl_k3, below: 0.5}, {metric: eval/aime/avg@32, below: 0.5}]"
    small = small_of(DENSE, gates)
    rows = [{"mismatch/kl_k3": value, "eval/accuracy": 0.0} for value in (0.0, 1e9)]
    assert len(small.gates) == 1
    assert check(small.gates, rows) == judge(small.gates, rows) == []
    assert small.trainer.eval_every <= 2


def test_problems_are_asked_in_few_tokens(tmp_path):
    small = small_of(DENSE, folder=tmp_path)
    write(small, tmp_path)
    problems = make(small.task, built_tokenizer(small.model.build), seed=0)
    prompts = problems.training_prompts(0, small.rollout.prompts)
    assert all(len(prompt.ids) == len(prompt.text) == 25 for prompt in prompts)


@given(
    st.lists(st.booleans(), max_size=40),
    st.builds(LossScale, window=st.integers(1, 5), hysteresis=st.integers(1, 3)),
)
def test_the_loss_scale_after_an_update_is_the_scalers(overflows, settings):
    scaler = LossScaler(settings, torch.device("cpu"))
    for overflow in overflows:
        scaler.update(overflow)
    expected = scaler_after(scaler.state_dict(), settings)
    scaler.update(False)
    assert scaler.state_dict() == expected


def parameter_after(updates, settings):
    """A weight and torch's AdamW after so many updates, with gradients of very different sizes."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4000))
    betas, decay = (settings.beta1, settings.beta2), settings.weight_decay
    adam = torch.optim.AdamW([weight], settings.lr, betas, settings.eps, weight_decay=decay)
    for _ in range(updates):
        update(weight, adam)
    return weight, adam


def update(weight, adam):
    size = 10.0 ** torch.randint(-25, 3, weight.shape)
    weight.grad = torch.randn_like(weight) * size * (torch.rand_like(weight) > 0.2)
    adam.step()


def state(weight, adam):
    moments = adam.state[weight]
    return tuple(t.detach().clone() for t in (weight, moments["exp_avg"], moments["exp_avg_sq"]))


@pytest.mark.parametrize(
    "settings",
    [
        Optimizer(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.1),
        Optimizer(lr=3e-2, beta1=0.8, beta2=0.98, eps=1e-15),
    ],
)
def test_adam_that_has_lost_a_part_of_its_state_is_noticed(settings):
    moments = "exp_avg and exp_avg_sq"
    faults = {None: None, "exp_avg": moments, "exp_avg_sq": moments, "weight": "the weights"}
    for lost, fault in faults.items():
        weight, adam = parameter_after(3, settings)
        old, imported = state(weight, adam), parameter_after(0, settings)[0]
        if lost == "weight":
            weight.data.copy_(imported.data)
        elif lost:
            adam.state[weight][lost].zero_()
        update(weight, adam)
        assert adam_fault(old, state(weight, adam), 4, settings.lr, settings) == fault


def test_an_environment_is_rehearsed_with_another_and_a_users_function_is_refused(tmp_path):
    path = recipes.find("tiny/calculator-grpo-fp16")
    small = small_of(path, folder=tmp_path)
    write(small, tmp_path)
    game = make(small.task, built_tokenizer(small.model.build), seed=0)
    (prompt,) = game.training_prompts(0, 1)
    problem = game.as_problem(prompt)
    first = Transcript(*problem, turns=["11="])
    assert game.environment.step(first).result().text == "1<"
    last = Transcript(*problem, turns=["11=", "0", "1="], said=["1<", "1<"])
    assert game.environment.step(last).result().grade.reward == 0.5
    game.environment.close()
    with pytest.raises(
        RecipeError, match=r"rollout\.function=own\.py:f: a rehearsal has another model"
    ):
        small_of(recipes.find("tiny/dense-grpo-fp16"), "rollout.function=own.py:f")
