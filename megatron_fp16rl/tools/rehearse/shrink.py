"""The small copy of a recipe that a rehearsal runs."""

import math
import random
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from megatron_fp16rl.metrics import gates
from megatron_fp16rl.models.build import build
from megatron_fp16rl.models.families import FAMILIES
from megatron_fp16rl.recipe import (
    TORCH_DTYPES,
    EnvironmentTask,
    Layout,
    Model,
    Recipe,
    RecipeError,
)
from megatron_fp16rl.utils.files import parse_json, write_json, write_json_lines, write_text

MODEL = "model"  # in a rehearsal's folder
STEPS = 2  # before the checkpoint; one more step follows the resume
_PROMPT_TOKENS, _NEW_TOKENS, _POSITIONS = 32, 24, 128
_PROMPTS, _MOST_SAMPLES, _MOST_UPDATES = 16, 4, 2
_TIMEOUT_S = 900  # on a busy machine
# Parallel axes in the order in which they are kept.
_AXES = (
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
    "expert_parallel",
    "expert_tensor_parallel",
)

# Problems are binary numbers: with so few tokens every prompt has signal.
_ALPHABET = "01=<>+"
_PROBLEMS, _DIGITS = 128, 24
_REWARD = '''"""The reward of a rehearsal: the share of ones in a response."""


def score(prompt: str, response: str, answer: str) -> float:
    return response.count("1") / max(1, len(response))
'''
_ENVIRONMENT = '''"""The environment of a rehearsal: it counts ones, and speaks twice."""


class Ones:
    def reset(self, problem: str, answer: str) -> None:
        self.turns: list[str] = []

    def step(self, turn: str) -> str | None:
        self.turns.append(turn)
        return "1<" if len(self.turns) < 3 else None

    def reward(self) -> float:
        text = "".join(self.turns)
        return text.count("1") / max(1, len(text))
'''


def shrink(recipe: Recipe, config: PretrainedConfig, ranks: int, folder: Path) -> Recipe:
    """The recipe on at most `ranks` ranks, with a tiny model and batch; its task's files are in `folder`.

    config: of the full model. Algorithm, precision, loss scale, weight sync, recomputation, adapters
    and router replay stay as they are. Raises RecipeError for rollouts of a function.
    """
    if recipe.rollout.function is not None:
        raise RecipeError(
            f"rollout.function={recipe.rollout.function}: a rehearsal has another model, and problems that the "
            "function does not know; rehearse the rest with --set rollout.function=null"
        )
    layout = fold(recipe.learner, ranks)
    values = recipe.model_dump()
    values |= dict.fromkeys(("base", "warm_start", "slurm", "provenance"))
    values["description"] = f"rehearsal of {recipe.name}"
    layers = max(2, layout["pipeline_parallel"] * layout["model_chunks"])
    values["model"] = {"build": {"config": _tiny(config, layers), "alphabet": _ALPHABET}}
    values["task"] = _task(recipe, folder)
    # A bound that no random model breaks: the run looks whether there are such metrics.
    values["gates"] = [
        {"metric": gate.metric, "above": sys.float_info.max}
        for gate in gates.of(recipe)
        if gate.metric.count("/") == 1  # eval/SUITE/METRIC: suites are left out
    ]
    values["trackers"] = ["tensorboard"]  # a rehearsal is no run to keep
    values["rollout"] |= _rollout(recipe)
    values["learner"] |= layout | _learner(recipe)
    if values["algorithm"]["overlong"] is not None:
        values["algorithm"]["overlong"]["buffer"] = _NEW_TOKENS // 4
    values["sync"]["verify"] = "always"
    values["checkpoint"] |= {"every": STEPS, "keep_last": 2}
    values["trainer"] |= {
        "steps": 1000,  # the first attempt is killed, and must not end
        "eval_every": STEPS,
        "eval_prompts": 16,
        "suites": [],
        "run_root": str(folder),
        "max_restarts": 0,  # a rank that dies is a result
        "step_timeout_s": _TIMEOUT_S,
    }
    return Recipe.model_validate(values)


def _task(recipe: Recipe, folder: Path) -> dict[str, Any]:
    problems = {"template": "none", "instruction": ""}
    if isinstance(recipe.task, EnvironmentTask):
        path = f"{folder / 'environment.py'}:Ones"
        file = str(folder / "problems.jsonl")
        return {"kind": "environment", "path": path, "problems": file, **problems}
    reward = {"kind": "function", "path": f"{folder / 'reward.py'}:score"}
    return {"kind": "dataset", "path": str(folder / "problems.jsonl"), **problems, "reward": reward}


def fold(full: Layout, ranks: int) -> dict[str, Any]:
    """Values of Layout's fields on at most `ranks` ranks.

    An axis that is more than 1 becomes 2 while ranks last, in the order of _AXES, then data parallelism.
    """
    sizes = dict.fromkeys((*_AXES, "data_parallel"), 1)
    for axis in sizes:
        wider = {**sizes, axis: min(2, getattr(full, axis))}
        if _world_size(wider) <= ranks:
            sizes = wider
    pipeline = sizes["pipeline_parallel"]
    return {
        "ranks": _world_size(sizes),
        **{axis: sizes[axis] for axis in _AXES},
        "sequence_parallel": full.sequence_parallel and sizes["tensor_parallel"] > 1,
        "model_chunks": min(full.model_chunks, 2) if pipeline > 1 else 1,
        "first_stage_layers": None,
        "last_stage_layers": None,
    }


def _world_size(sizes: dict[str, int]) -> int:
    """The fewest ranks; those that share experts are tensor-, context- or data-parallel for the rest of the model."""
    tensor, pipeline, context, expert, expert_tensor, data = sizes.values()
    return math.lcm(tensor * pipeline * context * data, expert * expert_tensor * pipeline)


def _tiny(config: PretrainedConfig, layers: int) -> dict[str, Any]:
    """The tiny configuration of a model's family, with the model's own flags, e.g. tied embeddings."""
    tiny = next(iter(FAMILIES[config.model_type].tiny.values()))
    flags = {key: getattr(config, key, on) for key, on in tiny.items() if isinstance(on, bool)}
    return {
        **tiny,
        **flags,
        "model_type": config.model_type,
        "num_hidden_layers": layers,
        # So large that log-probs change with any wrong tensor.
        "initializer_range": 0.1,
    }


def _rollout(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.rollout
    return {
        "prompts": _PROMPTS,
        "samples": min(_MOST_SAMPLES, settings.samples),
        "max_new_tokens": _NEW_TOKENS,
        "servers": min(2, settings.servers),
        "tensor_parallel": min(2, settings.tensor_parallel),
        "host": "127.0.0.1",
        # Turns end often enough for several.
        "stop": ["="] if isinstance(recipe.task, EnvironmentTask) else recipe.rollout.stop,
        "replay": None,
        "record": True,
        "sglang": {"context_length": _POSITIONS},  # most other options are for GPUs
        "max_restarts": 0,  # a server that dies is a result
        "start_timeout_s": max(_TIMEOUT_S, settings.start_timeout_s),
    }


def _learner(recipe: Recipe) -> dict[str, Any]:
    learner, rollout = recipe.learner, recipe.rollout
    updates = rollout.prompts * rollout.samples // learner.global_batch_size
    sequences = _PROMPTS * min(_MOST_SAMPLES, rollout.samples)
    # Other options of Megatron are for GPUs. recompute_num_layers: a stage may have one layer.
    kept = ("recompute_", "fp32_residual_connection")
    options = {k: v for k, v in learner.megatron.items() if k.startswith(kept)}
    if options.get("recompute_num_layers"):
        options["recompute_num_layers"] = 1
    return {
        "global_batch_size": sequences // max(1, min(_MOST_UPDATES, updates)),
        "megatron": options,
        # Fewer ranks may have no model chunks to align.
        "ddp": {k: v for k, v in learner.ddp.items() if k != "align_param_gather"},
        "micro_batch_tokens": 4 * (_PROMPT_TOKENS + _NEW_TOKENS),
        "pad_to_multiple_of": None,
        # Moves a random model in three steps.
        "optimizer": learner.optimizer.model_dump() | {"lr": 1e-3, "warmup_updates": 0},
    }


def write(recipe: Recipe, folder: Path) -> None:
    """Writes a small recipe, its model and all else that it names into `folder`."""
    assert recipe.model.build is not None
    build(recipe.model.build, folder / MODEL)
    # The padding token's embedding is zero: a random model samples it, and the gradient of the norm of zero
    # (1e5) overflows in fp16.
    file = folder / MODEL / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    embedding[0] = -embedding[-1]
    save_file(weights, file, metadata={"format": "pt"})
    described = folder / MODEL / "config.json"
    values = parse_json(described.read_bytes())
    if FAMILIES[values["model_type"]].served_as_saved:
        write_json(described, {**values, "dtype": TORCH_DTYPES[recipe.precision.served]})
    model = Model(path=str(folder / MODEL))
    write_text(folder / "recipe.yaml", recipe.model_copy(update={"model": model}).to_yaml())
    write_text(folder / "reward.py", _REWARD)
    write_text(folder / "environment.py", _ENVIRONMENT)
    bits = random.Random(recipe.task.seed)
    numbers = [f"{bits.getrandbits(_DIGITS):0{_DIGITS}b}" for _ in range(_PROBLEMS)]
    rows = [{"problem": f"{number}=", "answer": str(number.count("1") % 2)} for number in numbers]
    write_json_lines(folder / "problems.jsonl", rows)
