"""Hidden states of a served model: the outputs of its layers, to compare with Megatron's.

SGLang (0.5.23, `--forward-hooks`) calls a function with the output of a module. Ours writes it as
safetensors while a folder exists, which the client makes for one request; at other times it only
checks for that folder. For servers of one rank.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_fp16rl.rollout.client import Client, ServerError

EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final norm", "logits"


def points(layers: int) -> list[str]:
    """Where hidden states are taken, in the order of the computation."""
    return [EMBEDDING, *(f"layer {i}" for i in range(layers)), FINAL_NORM, LOGITS]


def server_options(folder: Path, layers: int) -> dict[str, str]:
    """Options (`rollout.sglang`) of a server that writes into `folder` while it exists."""
    modules = {
        EMBEDDING: "model.embed_tokens",
        FINAL_NORM: "model.norm",
        LOGITS: "logits_processor",
    }
    specs = [
        {
            "name": point,
            "target_modules": [modules.get(point, f"model.layers.{point.split()[-1]}")],
            "hook_factory": f"{__name__}:writer",
            "config": {"point": point, "file": str(_file(folder.resolve(), point))},
        }
        for point in points(layers)
    ]
    return {"forward_hooks": json.dumps(specs)}


def served_states(
    client: Client, folder: Path, ids: list[int], layers: int
) -> dict[str, torch.Tensor]:
    """Hidden states [tokens, hidden] of a sequence at each of `points`, in the served dtype.

    Of the logits those of the last token, [vocabulary], in the dtype SGLang samples from. folder: as
    given to `server_options`. One prefill of the whole sequence: what a decode step computes is not
    seen. Raises ServerError if the server did not write all of it.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a study that was killed
    folder.mkdir(parents=True)
    try:
        client.score([ids])
        states = {}
        for point in points(layers):
            file = _file(folder, point)
            if not file.exists():
                raise ServerError(f"{client.url} wrote no hidden states of {point}")
            states[point] = load_file(file)["value"]
    finally:
        shutil.rmtree(folder)
    for point in points(layers)[:-1]:
        if len(states[point]) != len(ids):
            raise ServerError(
                f"{client.url} computed {len(states[point])} of {len(ids)} tokens at once in {point}: "
                "raise its chunked_prefill_size"
            )
    states[LOGITS] = states[LOGITS][-1]
    return states


def writer(config: dict[str, str]) -> Callable[..., None]:
    """A forward hook: what SGLang calls, in the server, for each entry of `server_options`."""
    point, file = config["point"], Path(config["file"])

    def write(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # The first pass is the prefill; with overlapped scheduling a decode step may follow it.
        if file.parent.exists() and not file.exists():
            temporary = file.with_suffix(".part")
            save_file(
                {"value": _value(point, inputs, output).detach().cpu().contiguous()}, temporary
            )
            os.replace(temporary, file)

    return write


def _value(point: str, inputs: tuple[Any, ...], output: Any) -> torch.Tensor:
    """The tensor of an output; of a layer, with the residual that SGLang adds in the next norm."""
    from sglang.srt.layers.layer_boundary.residual import batch as residual
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    if isinstance(output, LogitsProcessorOutput):
        return output.next_token_logits
    value = output[0] if isinstance(output, tuple) else output
    if point in (EMBEDDING, FINAL_NORM):
        return value
    batch = next((value for value in inputs if isinstance(value, ForwardBatch)), None)
    if batch is None:
        raise RuntimeError(f"SGLang calls {point} without a ForwardBatch, which has its residual")
    return residual.snapshot(value, batch)


def _file(folder: Path, point: str) -> Path:
    return folder / f"{point.replace(' ', '_')}.safetensors"
