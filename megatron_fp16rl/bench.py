"""Measuring speed: ratios within one run, because machines differ and drift."""

import statistics
import time
from pathlib import Path

from megatron_fp16rl.processes import free_port
from megatron_fp16rl.recipe import BuildModel, Layout, Model, Recipe


def learner(
    layers: int, hidden: int, sequences: int, tokens: int, repeats: int
) -> dict[str, object]:
    """One whole Megatron step (forward, backward, Adam) in fp32 and in fp16, turn by turn.

    In this process, on one rank. Returns {"fp16_over_fp32", "grad_norm_difference", "rows"}.
    """
    from megatron_fp16rl import platform
    from megatron_fp16rl.learner import world as ranks
    from megatron_fp16rl.weights.build import model_folder

    ranks.single_process_environment(free_port("127.0.0.1"))
    world = ranks.initialize(Layout(), seed=0)
    recipes = {dtype: _recipe(layers, hidden, sequences, dtype) for dtype in ("fp32", "fp16")}
    folder = model_folder(recipes["fp32"].model)
    batch = _random_batch(sequences, tokens).to(world.device)
    steps = {dtype: _stepper(recipe, folder, world, batch) for dtype, recipe in recipes.items()}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in steps}
    norms = {dtype: step() for dtype, step in steps.items()}  # warm-up; both from the same weights
    for _ in range(repeats):
        for dtype, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[dtype].append(time.perf_counter() - began)
    ranks.shutdown()
    ratios = [fp32 / fp16 for fp32, fp16 in zip(seconds["fp32"], seconds["fp16"], strict=True)]
    return {
        "fp16_over_fp32": statistics.median(ratios),
        "grad_norm_difference": abs(norms["fp16"] / norms["fp32"] - 1),
        "platform": platform.current().describe(),
        "rows": [
            {
                "dtype": dtype,
                "tokens_per_s": sequences * tokens / statistics.median(values),
                "seconds": statistics.median(values),
                "grad_norm": norms[dtype],
                "layout": "1 rank",
            }
            for dtype, values in seconds.items()
        ],
    }


def _recipe(layers: int, hidden: int, sequences: int, dtype: str) -> Recipe:
    config = {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    characters = "".join(chr(0x4E00 + i) for i in range(1022))  # with two special tokens: 1,024
    return Recipe.model_validate(
        {
            "name": f"bench-{dtype}",
            "model": Model(build=BuildModel(config=config, alphabet=characters)),
            "task": {"kind": "addition"},
            "rollout": {"prompts": 1, "samples": sequences, "max_new_tokens": 1},
            "learner": {"global_batch_size": sequences, "micro_batch_tokens": 1 << 20},
            "precision": {"dtype": dtype},
            "trainer": {"steps": 0},
        }
    )


def _stepper(recipe: Recipe, folder: Path, world: object, batch: object) -> object:
    """A function that makes one optimizer step and returns its gradient norm."""
    from megatron_fp16rl.learner import Learner

    trained = Learner(recipe, folder, world)
    return lambda: trained.supervised_step(batch)[0].grad_norm


def _random_batch(sequences: int, tokens: int) -> object:
    import torch

    from megatron_fp16rl.batch import Batch

    generator = torch.Generator().manual_seed(0)
    shape = (sequences, tokens)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(
        tokens=torch.randint(2, 1024, shape, generator=generator),
        lengths=torch.full((sequences,), tokens),
        mask=mask,
        mu_logprobs=torch.zeros(shape),
        rewards=torch.ones(sequences),
        groups=torch.arange(sequences),
        truncated=torch.zeros(sequences, dtype=torch.bool),
    )
