"""A study's samples and hidden states from a real server; those that are kept are not sampled again."""

import random
from collections.abc import Iterator
from pathlib import Path

from rich.progress import Progress
from safetensors.torch import save_file

from megatron_fp16rl.data.batch import Prompt, Sample
from megatron_fp16rl.recipe import Dtype
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.recording import read_samples, write_samples
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.tools.study import hidden
from megatron_fp16rl.tools.study.run import Study
from megatron_fp16rl.utils.files import new_folder

_CHUNK = 32  # sequences of one request: what an interrupted study loses
_TIMEOUT_S = 7200  # of a chunk


def sample(
    study: Study,
    prompts: list[Prompt],
    layers: int,
    dtype: Dtype,
    folder: Path,
    progress: Progress,
) -> None:
    """Samples what the study's `folder` lacks of a dtype. layers: of the model.

    Starts a server only if something is missing. Raises ServerDied and ServerError; what was sampled
    by then is kept.
    """
    own, watched = folder / dtype, folder / dtype / "watched"
    is_sampled = all(_file(own, first).exists() for first in range(0, len(prompts), _CHUNK))
    has_states = not study.compared or (own / "hidden").exists() or (own / "layers.json").exists()
    if is_sampled and has_states:
        return
    config = ServerConfig(
        dtype,
        deterministic=study.deterministic,
        sglang=hidden.server_options(watched, layers),
        seed=study.seed,
    )
    task = progress.add_task(f"{dtype}: a server starts", total=len(prompts))
    with launch_servers(config, study.model, folder / "logs" / dtype) as (endpoint,):
        client = Client(endpoint, _TIMEOUT_S)
        progress.update(task, description=f"{dtype}: SGLang samples")
        for count in fill(study, client, prompts, own):
            progress.advance(task, count)
        if not has_states:
            progress.update(task, description=f"{dtype}: hidden states")
            compared = read_all(folder, dtype)[: study.compared]
            with new_folder(own / "hidden") as states_folder:
                for i, one in enumerate(compared):
                    ids = one.prompt.ids + one.ids
                    states = hidden.served_states(client, watched, ids, layers)
                    save_file(states, states_folder / f"{i}.safetensors")


def fill(study: Study, client: Client, prompts: list[Prompt], folder: Path) -> Iterator[int]:
    """Samples what a dtype's `folder` lacks, chunk by chunk; yields the size of each."""
    for first in range(0, len(prompts), _CHUNK):
        chunk = prompts[first : first + _CHUNK]
        if not _file(folder, first).exists():
            samples = _sample_chunk(study, client, chunk, first)
            write_samples(folder / "samples", first // _CHUNK, 0, samples)
        yield len(chunk)


def read_all(folder: Path, dtype: Dtype) -> list[Sample]:
    """All samples of a dtype, in the order of their prompts."""
    samples = folder / dtype / "samples"
    chunks = range(len(list(samples.glob("step_*.jsonl"))))
    return [sample for chunk in chunks for sample in read_samples(samples, chunk)]


def _sample_chunk(study: Study, client: Client, prompts: list[Prompt], first: int) -> list[Sample]:
    """Samples prompts number `first` and following."""
    numbers = range(first, first + len(prompts))
    seeds = [random.Random(f"{study.seed}/{i}").getrandbits(62) for i in numbers]
    generations = client.generate(
        [prompt.ids for prompt in prompts],
        Sampling(study.max_tokens),
        seeds if study.deterministic else None,
    )
    return [
        Sample(prompt, i, g.ids, g.logprobs, g.text, g.truncated, version=0, reward=0.0)
        for i, prompt, g in zip(numbers, prompts, generations, strict=True)
    ]


def _file(folder: Path, first: int) -> Path:
    """The file of the chunk that begins at sample `first`; see recording.write_samples."""
    return folder / "samples" / f"step_{first // _CHUNK:05}.leader_0.jsonl"
