"""A study from start to end: settings, prompts, samples, scores, and the metrics over them."""

import gc
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from megatron_fp16rl import platform
from megatron_fp16rl.data.batch import Batch, Prompt, Sample, ScoredBatch
from megatron_fp16rl.data.tasks import templates
from megatron_fp16rl.data.tasks.dataset import read_problems
from megatron_fp16rl.metrics import mismatch
from megatron_fp16rl.models.check import check_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.models.spec import check_served, describe
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.parallel import initialize, shutdown, single_process_environment
from megatron_fp16rl.recipe import Dtype, Head, Layout, Precision, RecipeError
from megatron_fp16rl.recipe.learner import Learner as LearnerSettings
from megatron_fp16rl.rollout.client import Client, Sampling
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from megatron_fp16rl.tools.settings_file import check_settings, digest, weights_digest
from megatron_fp16rl.tools.study import hidden
from megatron_fp16rl.utils.files import read_json, write_json, write_json_lines
from megatron_fp16rl.utils.processes import free_port

Say = Callable[[str], None]
# What a server gave in one dtype: samples, and hidden states of the first few of them.
Sampled = tuple[list[Sample], list[dict[str, torch.Tensor]]]
_SETTINGS = LearnerSettings(global_batch_size=1, micro_batch_tokens=2048)
_CHUNK = 32  # sequences of one request
_TIMEOUT_S = 7200  # of a request
_RATIOS = ("logprob_abs_mean", "kl_k3", "kl_seq", "seq_log_ratio_std", "slope_per_1k_tokens")


@dataclass(frozen=True)
class Study:
    """What to measure.

    model      a Hugging Face folder
    prompts    a JSONL of {"problem": ...}
    samples    sequences of each dtype; the problems are repeated as often as that takes
    template   "chat": the tokenizer's; "none": the text of the problem alone
    compared   how many of the sequences are compared layer by layer
    deterministic   every sequence has its own seed, the same in every dtype; on a GPU, SGLang then
               uses other kernels
    head       of both engines, as precision.head
    """

    model: Path
    dtypes: tuple[Dtype, ...]
    prompts: Path
    samples: int
    max_tokens: int
    template: Literal["chat", "none"] = "chat"
    compared: int = 4
    seed: int = 0
    deterministic: bool = True
    head: Head = None


def run(study: Study, folder: Path, say: Say) -> dict[str, Any]:
    """Measures the dtypes that the study's folder lacks; returns what it writes as result.json.

    In this process, on one rank, with one server at a time. Raises RecipeError, ServerDied,
    ServerError, WeightsError if a dtype cannot hold the model, and NonFiniteForward.
    """
    check_folder(study.model)
    config = load_config(study.model)
    check_served(config)
    tokenizer = load_tokenizer(study.model)
    spec = describe(config, Layout())
    prompts = make_prompts(study, tokenizer, spec.max_positions)
    about = {
        "model": str(study.model),
        "versions": {name: version(name) for name in ("sglang", "megatron-core", "torch")},
        "platform": platform.current().NAME,
    }
    settings: dict[str, Any] = {
        **{key: value for key, value in asdict(study).items() if key != "dtypes"},
        **about,
        "weights": weights_digest(study.model),
        "prompts": digest([prompt.ids for prompt in prompts]),
    }
    check_settings(folder / "study.json", settings, "a study", "--name")
    missing = [d for d in study.dtypes if not (folder / d / "result.json").exists()]
    # All servers first: the learner's models would take their memory.
    layers = spec.transformer["num_layers"]
    sampled = {dtype: sample(study, prompts, layers, dtype, folder, say) for dtype in missing}
    if sampled:
        score(study, sampled, folder, tokenizer, say)
    results = {dtype: read_json(folder / dtype / "result.json") for dtype in study.dtypes}
    rows = [result["row"] for result in results.values()]
    compared = {dtype: r["layers"] for dtype, r in results.items() if r["layers"]}
    result = {**about, "rows": rows, "bf16_over_fp16": _ratios(rows), "layers": compared}
    write_json(folder / "result.json", result)
    return result


def make_prompts(study: Study, tokenizer: PreTrainedTokenizerBase, positions: int) -> list[Prompt]:
    """One prompt per sequence to sample. positions: of the model. Raises RecipeError."""
    texts = [text for text, _ in read_problems(study.prompts, answer="problem", key="--prompts")]
    if study.template == "chat":
        if not tokenizer.chat_template:
            raise RecipeError(f"{study.model} has no chat template; say --template none")
        texts = [templates.chat(text, tokenizer, {}) for text in texts]
    prompts = [Prompt(t, templates.encode(study.template, t, tokenizer), "") for t in texts]
    left = positions - max(len(prompt.ids) for prompt in prompts)
    if study.max_tokens > left:
        raise RecipeError(
            f"--max-tokens {study.max_tokens}: the longest prompt of {study.prompts} leaves {left} of "
            f"the {positions} positions of {study.model}"
        )
    return [prompts[i % len(prompts)] for i in range(study.samples)]


def sample(
    study: Study, prompts: list[Prompt], layers: int, dtype: Dtype, folder: Path, say: Say
) -> Sampled:
    """Samples all prompts from a server in a dtype. layers: of the model.

    Raises ServerDied, ServerError.
    """
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as scratch:
        watched = Path(scratch) / "watched"
        config = ServerConfig(
            dtype,
            deterministic=study.deterministic,
            sglang=hidden.server_options(watched, layers),
            seed=study.seed,
            head=study.head,
        )
        say(f"{dtype}: a server starts")
        with launch_servers(config, study.model, folder / "logs" / dtype) as (server,):
            client = Client(server.endpoint, _TIMEOUT_S)
            for start in range(0, len(prompts), _CHUNK):
                say(f"{dtype}: SGLang samples, {start} of {len(prompts)} done")
                chunk = prompts[start : start + _CHUNK]
                numbers = range(start, start + len(chunk))
                seeds = [random.Random(f"{study.seed}/{i}").getrandbits(62) for i in numbers]
                generations = client.generate(
                    [prompt.ids for prompt in chunk],
                    Sampling(study.max_tokens),
                    seeds if study.deterministic else None,
                )
                samples += [
                    Sample(prompt, i, g.ids, g.logprobs, g.text, g.truncated, version=0, reward=0.0)
                    for i, prompt, g in zip(numbers, chunk, generations, strict=True)
                ]
            states = [
                hidden.served_states(client, watched, one.prompt.ids + one.ids, layers)
                for one in samples[: study.compared]
            ]
    return samples, states


def score(
    study: Study,
    sampled: dict[Dtype, Sampled],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    say: Say,
) -> None:
    """Scores the samples of each dtype with Megatron, compares hidden states, and writes the results.

    DTYPE/scored.jsonl has one sequence a line, with the log-probs of both engines.
    """
    from megatron_fp16rl.comparison import noise

    single_process_environment(free_port("127.0.0.1"))
    world = initialize(Layout(), study.seed)
    from megatron_fp16rl.learner.learner import Learner
    from megatron_fp16rl.learner.loading import load
    from megatron_fp16rl.learner.model import Model
    from megatron_fp16rl.tools.study.layers import compare, learner_states

    reference: Model | None = None
    if study.compared:  # both engines are compared with Megatron in fp32
        reference = Model(describe(load_config(study.model), world.layout), "fp32", world)
        load(reference, HFFolder(study.model))
    for dtype, (samples, served) in sampled.items():
        say(f"{dtype}: Megatron scores")
        learner = Learner(study.model, world, _SETTINGS, Precision(dtype=dtype, head=study.head))
        batch = learner.score(Batch.from_samples(samples).to(world.device), temperature=1.0)
        metrics = {
            **mismatch.compare(batch, clip=mismatch.Clip(0.2, 0.2)),
            "learner_noise": noise(learner, batch, temperature=1.0),
        }
        counts = {"dtype": dtype, "sequences": len(batch), "tokens": int(batch.mask.sum())}
        layers: dict[str, Any] | None = None
        if reference is not None:
            tokens = [one.prompt.ids + one.ids for one in samples]
            states = (
                (of_server, learner_states(learner.model, ids), learner_states(reference, ids))
                for ids, of_server in zip(tokens, served, strict=False)
            )
            layers = compare(states, dtype)
        write_json_lines(folder / dtype / "scored.jsonl", sequence_rows(batch, tokenizer))
        write_json(folder / dtype / "result.json", {"row": counts | metrics, "layers": layers})
        del learner
        gc.collect()
    shutdown()


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """How many times larger the mismatch is in bf16; None without both dtypes."""
    by_dtype = {row["dtype"]: row for row in rows}
    if not {"bf16", "fp16"} <= set(by_dtype):
        return None
    bf16, fp16 = by_dtype["bf16"], by_dtype["fp16"]
    return {key: bf16[key] / fp16[key] for key in _RATIOS if fp16[key]}


def sequence_rows(batch: ScoredBatch, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Each sequence as plain values, and with the text of prompt and response, special tokens included.

    log_ratio is the sum of log pi - log mu over its response tokens, logprob_abs_mean the mean of
    |log pi - log mu|, both in nats; log-probs are those of the response tokens.
    """
    rows = []
    for i, length in enumerate(batch.lengths.tolist()):
        mask = batch.mask[i]
        mu, pi = batch.mu_logprobs[i][mask].double(), batch.pi[i][mask].double()
        tokens, is_response = batch.tokens[i, :length], mask[:length]
        prompt, response = tokens[~is_response].tolist(), tokens[is_response].tolist()
        rows.append(
            {
                "log_ratio": (pi - mu).sum().item(),
                "logprob_abs_mean": (pi - mu).abs().mean().item(),
                "prompt_ids": prompt,
                "response_ids": response,
                "mu_logprobs": mu.tolist(),
                "pi_logprobs": pi.tolist(),
                "prompt": tokenizer.decode(prompt),
                "response": tokenizer.decode(response),
            }
        )
    return rows
