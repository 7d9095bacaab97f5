"""The rows of the selftest, in the order in which they run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp16rl.tools.selftest.collectives import collectives
from megatron_fp16rl.tools.selftest.environment import environment
from megatron_fp16rl.tools.selftest.kernels import kernels
from megatron_fp16rl.tools.selftest.layouts import layouts
from megatron_fp16rl.tools.selftest.logprobs import logprobs
from megatron_fp16rl.tools.selftest.memory import memory
from megatron_fp16rl.tools.selftest.mismatch import mismatch
from megatron_fp16rl.tools.selftest.parity import parity
from megatron_fp16rl.tools.selftest.products import products
from megatron_fp16rl.tools.selftest.result import Answer, Check, NotHere, Setting
from megatron_fp16rl.tools.selftest.scaling import scaling
from megatron_fp16rl.tools.selftest.shapes import shapes
from megatron_fp16rl.tools.selftest.speed import speed
from megatron_fp16rl.tools.selftest.sync import sync
from megatron_fp16rl.tools.selftest.waits import waits


@dataclass(frozen=True)
class Row:
    """what: it asks. source: where its bounds come from. run: in a process of its own; may raise NotHere.

    in_quick: whether --quick runs it: it starts no servers, nor many ranks.
    """

    what: str
    source: str
    run: Callable[[Setting], list[Check]]
    timeout_s: float = 600  # kernels may have to be compiled
    in_quick: bool = True


ROWS = {
    "environment": Row(
        "what runs need of this machine",
        "fp16rl doctor; memory that InfiniBand may lock: launch/preflight.py",
        environment,
    ),
    "collectives": Row(
        "what arrives between ranks in fp16, fp32, int32 and bool, and how fast; over all nodes",
        "sums of small whole numbers are exact; pairs of a kind have equal links",
        collectives,
    ),
    "parity": Row(
        "fp32 learner, sequences packed, against transformers on the CPU, at a temperature",
        "fp32 rounds sums of this size to about 1e-6; docs/parity.md, all layouts, keeps to 1e-5",
        parity,
    ),
    "layouts": Row(
        "the same on several ranks: tensor, pipeline, context, expert and data parallel",
        "as for parity: the order of sums changes, and their rounding",
        layouts,
        in_quick=False,
    ),
    "scaling": Row(
        "fp16 learner against the fp32 one; an update whose gradients overflow; a checkpoint",
        "fp16 rounds to 2^-11 = 5e-4; what a skip and a checkpoint leave, and a scale of a half, are exact",
        scaling,
    ),
    "logprobs": Row(
        "log-probs of fp16 logits, 151,936 tokens in the vocabulary: memory beside the logits, value",
        "learner/logprobs.py: the gradient and one chunk of 64 MiB, never an fp32 copy; value against fp64, "
        "in fp32 near 16 nats a unit of the last place is 2e-6",
        logprobs,
    ),
    "products": Row(
        "sums of fp16 products, as decoding and learning have them, against fp64",
        "a sum in fp32, rounded to fp16 once, is half a unit of the last place off; parts added in fp16 "
        "are more, and overflow at 65,504",
        products,
    ),
    "kernels": Row(
        "norm, rope, attention and activation of a layer in fp16, each from its own inputs, against fp64",
        "half a unit of the last place where sums are fp32 and rounded once, and up to one for each factor "
        "that was rounded before",
        kernels,
    ),
    "waits": Row(
        "how often the host waits for the GPU in a scored and learnt micro-batch, by function",
        "those that the code needs, counted by reading it; one in a layer would be a multiple",
        waits,
    ),
    "shapes": Row(
        "updates on micro-batches of random lengths, and once more: what sizes cost once, memory that stays",
        "a plan of cuDNN takes up to a second a shape, learner.pad_to_multiple_of keeps shapes few; torch may "
        "reserve a tenth more than it needs, with expandable segments",
        shapes,
        in_quick=False,
    ),
    "speed": Row(
        "score and update of four layers, against a large fp16 product on the same GPU",
        "the planner takes 0.39 of the data sheet's peak, of which a large product has some 0.75; an update is "
        "three forward passes",
        speed,
    ),
    "memory": Row(
        "bytes of a learner and of its update, planned against allocated",
        "docs/planner.md: 3 % of what is always there, 15 % of what an update adds at its peak",
        memory,
    ),
    "sync": Row(
        "weights sent to two servers, after each update; one hangs in a sync, one is killed in one",
        "sync.timeout_s of 10 s and 10 s of grace; rounding of fp16 is below 1e-3 nats in such a model",
        sync,
        timeout_s=1200,
        in_quick=False,
    ),
    "mismatch": Row(
        "log-probs of a server's samples against the learner's, same weights",
        "bf16 has 3 bits less, a factor of 8: docs/results.md; 6e-3 nats is what SmolLM2-135M has in fp16",
        mismatch,
        timeout_s=1200,
        in_quick=False,
    ),
}


def answer(name: str, folder: str, quick: bool) -> dict[str, Any]:
    """What a row finds, in a process of its own."""
    Path(folder).mkdir()
    try:
        found = Answer(checks=ROWS[name].run(Setting(quick, Path(folder))))
    except NotHere as reason:
        found = Answer(not_here=str(reason))
    return found.model_dump()
