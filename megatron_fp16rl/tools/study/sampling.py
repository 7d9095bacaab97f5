"""A study's samples and hidden states from a real server, as far as they are not there yet."""

import random
from collections.abc import Iterator
from pathlib import Path

from rich.progress import Progress
from safetensors.torch import save_file

from megatron_fp16rl.data.batch import Prompt, Sample
from megatron_fp16rl.recipe import Dtype
from megatron_fp16rl.rollout import hidden
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.recording import read_samples, write_samples
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.tools.study.settings import Study
from megatron_fp16rl.utils.files import new_folder

_CHUNK = 32  # sequences sampled at once, and lost at most when a study is stopped
_TIMEOUT_S = 7200  # of a chunk


def sample(
    study: Study,
    prompts: list[Prompt],
    layers: int,
    dtype: Dtype,
    folder: Path,
    progress: Progress,
) -> None:
    """Starts a server unless all is there. layers: of the model; folder: the study's.

    Raises ServerDied and ServerError; what was sampled by then is kept.
    """
    here, watched = folder / dtype, folder / dtype / "watched"
    complete = all(_file(here, first).exists() for first in range(0, len(prompts), _CHUNK))
    compared = not study.compared or (here / "hidden").exists() or (here / "layers.json").exists()
    if complete and compared:
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
        for done in fill(study, client, prompts, here):
            progress.advance(task, done)
        if not compared:
            progress.update(task, description=f"{dtype}: hidden states")
            chosen = samples(folder, dtype)[: study.compared]
            with new_folder(here / "hidden") as made:
                for i, one in enumerate(chosen):
                    ids = one.prompt.ids + one.ids
                    states = hidden.served_states(client, watched, ids, layers)
                    save_file(states, made / f"{i}.safetensors")


def fill(study: Study, client: Client, prompts: list[Prompt], here: Path) -> Iterator[int]:
    """Samples what is missing of a dtype, whose folder is `here`; yields how many, as they are done."""
    for first in range(0, len(prompts), _CHUNK):
        chunk = prompts[first : first + _CHUNK]
        if not _file(here, first).exists():
            write_samples(here / "samples", first // _CHUNK, 0, _ask(study, client, chunk, first))
        yield len(chunk)


def samples(folder: Path, dtype: Dtype) -> list[Sample]:
    """All samples of a dtype, in the order of their prompts."""
    here = folder / dtype / "samples"
    chunks = range(len(list(here.glob("step_*.jsonl"))))
    return [sample for chunk in chunks for sample in read_samples(here, chunk)]


def _ask(study: Study, client: Client, prompts: list[Prompt], first: int) -> list[Sample]:
    """Samples of prompts that begin at number `first` of the study."""
    numbers = range(first, first + len(prompts))
    seeds = [random.Random(f"{study.seed}/{i}").getrandbits(62) for i in numbers]
    answers = client.generate(
        [prompt.ids for prompt in prompts],
        Sampling(study.max_tokens),
        seeds if study.deterministic else None,
    )
    return [
        Sample(prompt, i, a.ids, a.logprobs, a.text, a.truncated, version=0, reward=0.0)
        for i, prompt, a in zip(numbers, prompts, answers, strict=True)
    ]


def _file(here: Path, start: int) -> Path:
    """Where the samples from number `start` on are kept; see recording.write_samples."""
    return here / "samples" / f"step_{start // _CHUNK:05}.leader_0.jsonl"
