"""The learner's part of a study: what Megatron makes of the tokens that a server sampled."""

import gc
import json
import shutil
from pathlib import Path

from rich.progress import Progress
from safetensors.torch import load_file

from megatron_fp16rl.data.batch import Batch, Sample
from megatron_fp16rl.learner.learner import Learner
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.metrics.top_mismatched import sequence_rows, with_text
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.parallel import World, initialize, shutdown, single_process_environment
from megatron_fp16rl.recipe import Dtype, Layout, Precision
from megatron_fp16rl.recipe.learner import Learner as LearnerSettings
from megatron_fp16rl.tools.study.layers import Comparison, first_jump, learnt_states
from megatron_fp16rl.tools.study.sampling import samples
from megatron_fp16rl.tools.study.settings import Study
from megatron_fp16rl.utils.files import write_json, write_text
from megatron_fp16rl.utils.processes import free_port

_SETTINGS = LearnerSettings(global_batch_size=1, micro_batch_tokens=2048)
_PART = 8  # sequences between two movements of the progress bar


def learn(
    study: Study, dtypes: list[Dtype], folder: Path, tokenizer: object, progress: Progress
) -> None:
    """Scores the samples of `dtypes`, and compares their hidden states, in this process.

    Raises WeightsError if a dtype cannot hold the model, and NonFiniteForward.
    """
    single_process_environment(free_port("127.0.0.1"))
    world = initialize(Layout(), study.seed)
    reference = _model(study.model, "fp32", world) if study.compared else None
    for dtype in dtypes:
        found = samples(folder, dtype)
        learner = Learner(study.model, world, _SETTINGS, Precision(dtype=dtype))
        task = progress.add_task(f"{dtype}: Megatron scores", total=len(found))
        rows = []
        for start in range(0, len(found), _PART):
            part = found[start : start + _PART]
            scored = learner.score(Batch.from_samples(part).to(world.device), temperature=1.0)
            rows += [with_text(row, tokenizer) for row in sequence_rows(scored)]
            progress.advance(task, len(part))
        if reference is not None:
            _compare(found[: study.compared], dtype, folder / dtype, learner.model, reference)
        lines = [json.dumps(row) + "\n" for row in rows]
        write_text(folder / dtype / "scored.jsonl", "".join(lines))
        del learner
        gc.collect()
    shutdown()


def _compare(
    chosen: list[Sample], dtype: Dtype, here: Path, model: Model, reference: Model
) -> None:
    """Writes layers.json, and removes the server's hidden states, which are large."""
    found = Comparison(model.config.num_layers, dtype)
    for i, sample in enumerate(chosen):
        ids = sample.prompt.ids + sample.ids
        served = load_file(here / "hidden" / f"{i}.safetensors")
        found.add(served, learnt_states(model, ids), learnt_states(reference, ids))
    rows = found.rows()
    write_json(
        here / "layers.json",
        {"tokens": found.tokens, "first_jump": first_jump(rows), "points": rows},
    )
    shutil.rmtree(here / "hidden")


def _model(folder: Path, dtype: Dtype, world: World) -> Model:
    model = Model(describe(load_config(folder), world.layout), dtype, world)
    model.load(HFFolder(folder))
    return model
