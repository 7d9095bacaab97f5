"""Row logprobs: memory and value of the log-probs of a large vocabulary."""

import torch

from megatron_fp16rl import platform
from megatron_fp16rl.tools.plan.live_bytes import counted
from megatron_fp16rl.tools.selftest import models
from megatron_fp16rl.tools.selftest.result import Check, Setting, at_most

_VOCABULARY = 151_936
_TEMPERATURE = 0.7
_CHUNK = 64 << 20  # bytes, see learner/logprobs.py
_OF_A_ROW = 128  # bytes: its sums, largest logit, target
_MIB = 1 << 20
_SLACK = 4 * _MIB  # a GPU's allocator gives up to 1 MiB more than it is asked for


def logprobs(setting: Setting) -> list[Check]:
    """fp16 logits [rows, vocabulary], their log-probs and gradient."""
    world = models.world()
    from megatron_fp16rl.learner.logprobs import token_logprobs

    device = world.device
    rows = 8192 if platform.current().NAME == "cuda" and not setting.quick else 256
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, _VOCABULARY, dtype=torch.float16, device=device)
    logits.normal_(0, 2, generator=generator).requires_grad_()
    targets = torch.randint(0, _VOCABULARY, (rows,), generator=generator, device=device)

    def run() -> torch.Tensor:
        return token_logprobs(logits, targets, _VOCABULARY, world.tensor.group, _TEMPERATURE)

    with torch.no_grad(), counted(device) as forward:
        run()
    with counted(device) as both:
        run().sum().backward()
    assert logits.grad is not None
    few = slice(64)
    exact = logits[few].detach().double().requires_grad_()
    expected = (exact / _TEMPERATURE).log_softmax(-1).gather(1, targets[few, None])[:, 0]
    expected.sum().backward()
    assert exact.grad is not None
    more = _CHUNK + _OF_A_ROW * rows + _SLACK
    return [
        at_most("MiB beside the logits, forward", forward.peak / _MIB, more / _MIB),
        at_most(
            "MiB beside the logits, both ways", both.peak / _MIB, (logits.nbytes + more) / _MIB
        ),
        at_most("log-probs, nats", (run()[few] - expected).abs().max().item(), 4e-6),
        at_most("gradient in fp16", (logits.grad[few] - exact.grad).abs().max().item(), 1e-3),
    ]
