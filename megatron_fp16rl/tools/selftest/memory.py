"""Row memory: a plan of a learner against the learner."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.models.build import build
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.recipe import BuildModel, Recipe
from megatron_fp16rl.tools.plan.lengths import longest
from megatron_fp16rl.tools.plan.live_bytes import counted
from megatron_fp16rl.tools.selftest import models, process
from megatron_fp16rl.tools.selftest.result import Check, Setting, at_most

if TYPE_CHECKING:  # importing it imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

_STATIC, _PEAK, _LEFT = 0.03, 0.15, 0.01
_PLAN_TIMEOUT_S = 300
_SEQUENCES = 16
# hidden, intermediate, heads, head_dim, vocabulary, tokens of a sequence
SMALL, LARGE = (128, 320, 4, 32, 99, 64), (2048, 8192, 16, 128, 16384, 2048)


class Bytes(NamedTuple):
    """static: always there. training: more than that at the peak of an update."""

    static: int
    training: int


def memory(setting: Setting) -> list[Check]:
    """Four layers of a dense model in fp16, sixteen sequences, two at once."""
    on_gpu = platform.current().NAME == "cuda"
    chosen = recipe(*(LARGE if on_gpu else SMALL))
    folder = setting.folder / "model"
    assert chosen.model.build is not None
    build(chosen.model.build, folder)
    given = {
        "recipe": chosen.model_dump(mode="json"),
        "model": str(folder),
        "attention": "flash" if on_gpu else "local",
    }
    # A process that plans can do nothing else.
    (answer,) = process.call("memory.plan", setting.folder / "plan", given, _PLAN_TIMEOUT_S)
    plan, (real, left) = Bytes(*answer), measured(chosen, folder)
    return [
        at_most("always there, error of the plan", abs(plan.static / real.static - 1), _STATIC),
        at_most("of an update, error of the plan", abs(plan.training / real.training - 1), _PEAK),
        at_most("left by a checkpoint, over what is always there", left / real.static, _LEFT),
    ]


def recipe(
    hidden: int, intermediate: int, heads: int, head_dim: int, vocabulary: int, seq: int
) -> Recipe:
    """Four dense layers, and updates of sixteen sequences of `seq` tokens, two in a micro-batch."""
    config = {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": head_dim,
        "max_position_embeddings": seq,
        "tie_word_embeddings": False,
    }
    # All of the addition task's characters, and as many others as it takes.
    alphabet = "0123456789+=" + "".join(chr(0x4E00 + i) for i in range(vocabulary - 14))
    return Recipe.model_validate(
        {
            "name": "selftest",
            "model": {"build": BuildModel(config=config, alphabet=alphabet).model_dump()},
            "task": {"kind": "addition"},
            "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": seq - 6},
            "learner": {
                "global_batch_size": _SEQUENCES,
                "micro_batch_tokens": 2 * seq,
                "pad_to_multiple_of": 1,  # plans pad as GPUs do otherwise
            },
            "trainer": {"steps": 1},
        }
    )


def measured(recipe: Recipe, folder: Path) -> tuple[Bytes, int]:
    """The bytes of a learner between updates, and the most that its second update has beside them.

    And the bytes that a checkpoint leaves.
    """
    world = models.world()
    from megatron_fp16rl.learner import checkpoint
    from megatron_fp16rl.learner.learner import Learner

    seq = longest(recipe).sequence
    batch = Batch.from_token_ids(models.random_tokens(lengths=(seq,) * _SEQUENCES))
    with counted(world.device) as always:
        learner = Learner.from_recipe(recipe, folder, world)
        batch = learner.share(batch)
        learner.supervised_update(batch)  # Adam has its state from now on
        _drop_scratch(learner)
    static = always.now
    with counted(world.device) as update:
        learner.supervised_update(batch)
    _drop_scratch(learner)
    with counted(world.device) as saved:
        progress = checkpoint.Progress(1, 1)
        checkpoint.save(learner, folder.parent / "checkpoints", progress, folder)
    return Bytes(static, update.peak), saved.now


def _drop_scratch(learner: "Learner") -> None:
    """What Megatron keeps of the last micro-batch, to be used again."""
    from megatron.core import parallel_state

    parallel_state.get_global_memory_buffer().buffer.clear()
    for gpt in learner.model.gpt_models:
        gpt.set_input_tensor([None])


def plan(recipe: dict[str, Any], model: str, attention: Literal["flash", "local"]) -> Bytes:
    """The plan, in a process of its own. attention: see meta.Assumptions."""
    platform.plan_only()
    from megatron_fp16rl.platform import meta
    from megatron_fp16rl.tools.plan.memory import learner_memory

    with meta.assuming(attention=attention):
        (rank,) = learner_memory(Recipe.model_validate(recipe), load_config(model)).ranks
    return Bytes(rank.static, rank.training)
