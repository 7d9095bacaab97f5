"""Row memory: a plan of a learner against the learner.

`python -m megatron_fp16rl.tools.selftest.memory RECIPE MODEL ATTENTION ANSWER` plans: such a process can do nothing else.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch
from megatron_fp16rl.models.build import build
from megatron_fp16rl.recipe import BuildModel, Recipe
from megatron_fp16rl.tools.plan.live_bytes import LiveBytes
from megatron_fp16rl.tools.selftest import models
from megatron_fp16rl.tools.selftest.result import Check, Setting, at_most
from megatron_fp16rl.utils.processes import die_with_parent, spawn, stop, tail

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
    with planning(chosen, folder, "flash" if on_gpu else "local") as finish:
        (real, left), plan = measured(chosen, folder), finish()
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
    from megatron_fp16rl.tools.plan.lengths import longest

    seq = longest(recipe).sequence
    batch = Batch.from_token_ids(models.random_tokens(lengths=(seq,) * _SEQUENCES))
    on_gpu = platform.current().NAME == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    with LiveBytes(world.device.type) as live:
        learner = Learner.from_recipe(recipe, folder, world)
        batch = learner.share(batch)
        learner.supervised_update(batch)  # Adam has its state from now on
        _drop_scratch(learner)
    static = torch.cuda.memory_allocated() - before if on_gpu else live.now
    with _peak(on_gpu) as training:
        learner.supervised_update(batch)
    _drop_scratch(learner)
    saved = torch.cuda.memory_allocated() if on_gpu else 0
    with LiveBytes(world.device.type) as live:
        progress = checkpoint.Progress(1, 1)
        checkpoint.save(learner, folder.parent / "checkpoints", progress, folder)
    left = torch.cuda.memory_allocated() - saved if on_gpu else live.now
    return Bytes(static, training()), left


@contextlib.contextmanager
def _peak(on_gpu: bool) -> Iterator[Callable[[], int]]:
    """Yields a function for the most bytes that the block had beside those of its beginning."""
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes("cpu") as live:
            yield lambda: live.peak


def _drop_scratch(learner: "Learner") -> None:
    """What Megatron keeps of the last micro-batch, to be used again."""
    from megatron.core import parallel_state

    parallel_state.get_global_memory_buffer().buffer.clear()
    for gpt in learner.model.gpt_models:
        gpt.set_input_tensor([None])


@contextlib.contextmanager
def planning(recipe: Recipe, folder: Path, attention: str) -> Iterator[Callable[[], Bytes]]:
    """Plans the same in a process of its own; yields a function that waits for it. attention: see meta.Assumptions."""
    log, answer = folder.parent / "plan.log", folder.parent / "plan.json"
    given = folder.parent / "recipe.json"
    given.write_text(recipe.model_dump_json())
    command = [sys.executable, "-m", "megatron_fp16rl.tools.selftest.memory"]
    child = spawn([*command, str(given), str(folder), attention, str(answer)], log)

    def finish() -> Bytes:
        if code := child.wait(_PLAN_TIMEOUT_S):
            raise RuntimeError(f"the plan ended with {code}:\n{tail(log)}")
        return Bytes(*json.loads(answer.read_text()))

    try:
        yield finish
    finally:
        stop([child], patience_s=0)


def _plan() -> None:
    die_with_parent()
    platform.plan_only()
    from megatron_fp16rl.models.config import load_config
    from megatron_fp16rl.platform import meta
    from megatron_fp16rl.tools.plan.memory import learner_memory

    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    with meta.assuming(attention="local" if sys.argv[3] == "local" else "flash"):
        (rank,) = learner_memory(recipe, load_config(sys.argv[2])).ranks
    Path(sys.argv[4]).write_text(json.dumps([rank.static, rank.training]))


if __name__ == "__main__":
    _plan()
