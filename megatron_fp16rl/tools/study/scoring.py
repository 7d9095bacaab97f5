"""The learner's part of a study: Megatron's log-probs and hidden states of the sampled tokens."""

import gc
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress
from safetensors.torch import load_file

from megatron_fp16rl.data.batch import Batch, Sample
from megatron_fp16rl.learner.learner import Learner
from megatron_fp16rl.learner.model import Model
from megatron_fp16rl.metrics.top_mismatched import sequence_rows, with_text
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.models.spec import describe
from megatron_fp16rl.parallel import initialize, shutdown, single_process_environment
from megatron_fp16rl.recipe import Dtype, Layout, Precision
from megatron_fp16rl.recipe.learner import Learner as LearnerSettings
from megatron_fp16rl.tools.study.layers import Comparison, first_jump, learner_states
from megatron_fp16rl.tools.study.run import Study
from megatron_fp16rl.tools.study.sampling import read_all
from megatron_fp16rl.utils.files import write_json, write_text
from megatron_fp16rl.utils.processes import free_port

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTINGS = LearnerSettings(global_batch_size=1, micro_batch_tokens=2048)
_CHUNK = 8  # sequences between two updates of the progress bar


def score(
    study: Study,
    dtypes: list[Dtype],
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    progress: Progress,
) -> None:
    """Scores the samples of `dtypes`, and compares their hidden states, in this process.

    Raises WeightsError if a dtype cannot hold the model, and NonFiniteForward.
    """
    single_process_environment(free_port("127.0.0.1"))
    world = initialize(Layout(), study.seed)
    reference = None
    if study.compared:  # both engines are compared with Megatron in fp32
        reference = Model(describe(load_config(study.model), world.layout), "fp32", world)
        reference.load(HFFolder(study.model))
    for dtype in dtypes:
        samples = read_all(folder, dtype)
        learner = Learner(study.model, world, _SETTINGS, Precision(dtype=dtype))
        task = progress.add_task(f"{dtype}: Megatron scores", total=len(samples))
        rows = []
        for start in range(0, len(samples), _CHUNK):
            chunk = samples[start : start + _CHUNK]
            scored = learner.score(Batch.from_samples(chunk).to(world.device), temperature=1.0)
            rows += [with_text(row, tokenizer) for row in sequence_rows(scored)]
            progress.advance(task, len(chunk))
        if reference is not None:
            compared = samples[: study.compared]
            _compare(compared, dtype, folder / dtype, learner.model, reference)
        lines = [json.dumps(row) + "\n" for row in rows]
        write_text(folder / dtype / "scored.jsonl", "".join(lines))
        del learner
        gc.collect()
    shutdown()


def _compare(
    samples: list[Sample], dtype: Dtype, folder: Path, model: Model, reference: Model
) -> None:
    """Writes layers.json, and removes the server's hidden states, which are large."""
    comparison = Comparison(model.config.num_layers, dtype)
    for i, sample in enumerate(samples):
        ids = sample.prompt.ids + sample.ids
        served = load_file(folder / "hidden" / f"{i}.safetensors")
        comparison.add(served, learner_states(model, ids), learner_states(reference, ids))
    rows = comparison.rows()
    layers = {"tokens": comparison.tokens, "first_jump": first_jump(rows), "points": rows}
    write_json(folder / "layers.json", layers)
    shutil.rmtree(folder / "hidden")
