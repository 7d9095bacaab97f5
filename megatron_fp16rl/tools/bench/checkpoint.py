"""Steps that save a checkpoint, at once and in the background, against steps that do not."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fp16rl.learner.checkpoint_files import available
from megatron_fp16rl.models.build import model_folder
from megatron_fp16rl.parallel import initialize
from megatron_fp16rl.recipe import Recipe
from megatron_fp16rl.tools.bench.common import Result, spread
from megatron_fp16rl.tools.bench.learner import name_of, random_batch

if TYPE_CHECKING:
    from megatron_fp16rl.learner.background import Saver


def measure(recipe: Recipe, sequences: int, tokens: int, repeats: int) -> Result:
    """Times optimizer steps on `sequences` random sequences of `tokens` tokens.

    Collective over the learner's ranks. Checkpoints go to a folder in trainer.run_root, and are removed.
    """
    from megatron_fp16rl.learner.background import Saver
    from megatron_fp16rl.learner.checkpoint import Progress
    from megatron_fp16rl.learner.learner import Learner

    world = initialize(recipe.learner, seed=0)
    model, root = model_folder(recipe.model), Path(recipe.trainer.run_root)
    batch = random_batch(recipe, world, [tokens] * sequences)
    learner = Learner.from_recipe(recipe, model, world)
    root.mkdir(parents=True, exist_ok=True)
    own = tempfile.mkdtemp(dir=root, prefix="bench-checkpoint-") if world.is_rank0 else ""
    folder = Path(world.broadcast_from_rank0(own))
    steps, rows = 0, []

    def step() -> None:
        nonlocal steps
        learner.supervised_update(batch)
        steps += 1

    try:
        for background in (False, True):
            settings = recipe.checkpoint.model_copy(update={"background": background})
            saver = Saver(world, settings)

            def begin(saver: Saver = saver) -> None:
                saver.begin(learner, folder, Progress(steps, steps), model)

            row = _time(step, begin, saver, repeats)
            rows.append({"background": background, **row})
        newest = available(folder)[0].path
        total = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
        world.gather(None)  # all have looked
    finally:
        if world.is_rank0:
            shutil.rmtree(folder, ignore_errors=True)
    return {"layout": name_of(recipe.learner), "bytes": total, "rows": rows}


def _time(
    step: Callable[[], None], begin: Callable[[], None], saver: "Saver", repeats: int
) -> Result:
    """Seconds of plain steps, of steps that save, and of those while a checkpoint is being written.

    save_s: until the checkpoint is whole; other processes may be done within a step, at whose end it is.
    """
    plain, saving, beside, whole = [], [], [], []
    for repeat in range(repeats + 1):  # the first warms up
        began = time.perf_counter()
        step()
        middle = time.perf_counter()
        step()
        begin()
        ended = before = time.perf_counter()
        own = []
        while saver.is_writing:
            step()
            saver.end(wait=False)
            own.append(time.perf_counter() - before)
            before = time.perf_counter()
        if repeat:
            plain.append(middle - began)
            saving.append(ended - middle)
            beside += own
            whole.append(before - middle - plain[-1])
    return {
        **spread("step_s", plain),
        **spread("saving_step_s", saving),
        "saving_over_plain": statistics.median(s / p for s, p in zip(saving, plain, strict=True)),
        "step_beside_s": statistics.median(beside) if beside else None,
        "save_s": statistics.median(whole),
    }
