"""The recipe that a benchmark measures: one's own, or a random model of a given size."""

from collections.abc import Sequence
from pathlib import Path

from megatron_fp16rl.recipe import Recipe, load
from megatron_fp16rl.recipe.notation import setting

_BUILT_IN = Path(__file__).parent / "recipe.yaml"
_CHARACTERS = "0123456789+=" + "".join(chr(0x4E00 + i) for i in range(1010))  # 1,024 tokens
_ONE_PARTITION = "slurm.rollout_partition=null"


def recipe(
    path: Path | None,
    overrides: Sequence[str],
    ranks: int | None = None,
    layers: int = 4,
    hidden: int = 256,
) -> Recipe:
    """The recipe at `path`, or the built-in one with a model of this size. Raises RecipeError.

    ranks: of the learner, if not those of the recipe.
    """
    if path is not None:
        asked = [] if ranks is None else [f"learner.ranks={ranks}"]
        return load(path, [*asked, *overrides])
    ranks = ranks or 1
    config = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
    }
    built = [
        *(f"model.build.config.{key}={value}" for key, value in config.items()),
        setting("model.build.alphabet", _CHARACTERS),
        f"learner.ranks={ranks}",
        f"rollout.prompts={ranks}",
        f"learner.global_batch_size={8 * ranks}",
    ]
    return load(_BUILT_IN, [*built, *overrides])


def on_nodes(nodes: int, servers: bool) -> list[str]:
    """Overrides with which a recipe is checked against a job of so many nodes.

    servers: whether the benchmark starts the recipe's; they then share the one node. Without, they
    are made one that fits elsewhere, so that they take no devices from the ranks.
    """
    if servers:
        return [f"slurm.learner_nodes={nodes}", "slurm.rollout_nodes=0", _ONE_PARTITION]
    alone = ["slurm.rollout_nodes=1", "rollout.servers=1", "rollout.tensor_parallel=1"]
    return [f"slurm.learner_nodes={nodes}", *alone, _ONE_PARTITION]
