"""A study's samples and hidden states from a real server, as far as they are not there yet."""

import random
from pathlib import Path

from rich.progress import Progress
from safetensors.torch import save_file

from megatron_fp16rl.batch import Prompt, Sample
from megatron_fp16rl.files import new_folder
from megatron_fp16rl.recipe import Dtype, Rollout
from megatron_fp16rl.rollout import hidden
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.recording import read_samples, write_samples
from megatron_fp16rl.rollout.server import Serving, serving
from megatron_fp16rl.study.settings import Study

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
    here = folder / dtype
    starts = [s for s in range(0, len(prompts), _CHUNK) if not _file(here, s).exists()]
    wanted = study.compared and not any((here / n).exists() for n in ("hidden", "layers.json"))
    if not starts and not wanted:
        return
    watched = here / "watched"
    settings = Rollout(
        prompts=1,
        samples=1,
        max_new_tokens=study.max_tokens,
        deterministic=study.deterministic,
        sglang=hidden.server_options(watched, layers),
    )
    task = progress.add_task(f"{dtype}: a server starts", total=len(prompts))
    what, logs = Serving(settings, dtype, study.seed), folder / "logs" / dtype
    with serving(what, study.model, logs, lambda _: None) as (endpoint,):
        client = Client(endpoint, _TIMEOUT_S)
        progress.update(task, description=f"{dtype}: SGLang samples")
        for start in range(0, len(prompts), _CHUNK):
            chunk = prompts[start : start + _CHUNK]
            if start in starts:
                write_samples(
                    here / "samples", start // _CHUNK, 0, _ask(study, client, chunk, start)
                )
            progress.advance(task, len(chunk))
        if wanted:
            progress.update(task, description=f"{dtype}: hidden states")
            _save_states(client, watched, here, samples(folder, dtype)[: study.compared], layers)


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


def _save_states(
    client: Client, watched: Path, here: Path, chosen: list[Sample], layers: int
) -> None:
    with new_folder(here / "hidden") as folder:
        for i, one in enumerate(chosen):
            states = hidden.served_states(client, watched, one.prompt.ids + one.ids, layers)
            save_file(states, folder / f"{i}.safetensors")


def _file(here: Path, start: int) -> Path:
    """Where the samples from number `start` on are kept; see recording.write_samples."""
    return here / "samples" / f"step_{start // _CHUNK:05}.leader_0.jsonl"
