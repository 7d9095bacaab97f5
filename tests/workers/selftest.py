"""Rows of the selftest in a rank's process, with a fault planted."""

import contextlib
import functools
import importlib
import io
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def row(name: str, faults: Sequence[str] = ()) -> list[str]:
    """The checks of a row that do not hold."""
    from megatron_fp16rl import platform

    platform.current().prepare_learner()
    for fault in faults:
        globals()[fault]()
    from megatron_fp16rl.tools.selftest.result import Setting
    from megatron_fp16rl.tools.selftest.rows import ROWS

    with tempfile.TemporaryDirectory() as folder:
        checks = ROWS[name].run(Setting(True, Path(folder)))
    return [check.name for check in checks if not check.holds]


def unscaled_by_half() -> None:
    from megatron_fp16rl.learner.loss_scale import LossScaler

    unscale = LossScaler.unscale

    def by_half(scaler: LossScaler, gradients: list) -> bool:
        overflowed = unscale(scaler, gradients)
        torch._foreach_mul_(gradients, 2.0)
        return overflowed

    LossScaler.unscale = by_half


def scale_never_falls() -> None:
    from megatron_fp16rl.learner.loss_scale import LossScaler

    def keep(scaler: LossScaler, found_inf: bool) -> None:
        scaler.skipped_total += found_inf

    LossScaler.update = keep


def adam_counts_anew_after_a_checkpoint() -> None:
    from megatron_fp16rl.learner.optimizer import Optimizer

    restore = Optimizer.restore_step
    Optimizer.restore_step = lambda optimizer, parameter, step: restore(optimizer, parameter, 0)


def moments_decay_in_a_skip() -> None:
    from megatron_fp16rl.learner.optimizer import Optimizer

    skip = Optimizer._skip

    def decaying(optimizer: Optimizer, *arguments: object) -> object:
        for shard in optimizer.model.trained:
            optimizer.state_of(shard.parameter).tensors["exp_avg"].mul_(0.9)
        return skip(optimizer, *arguments)

    Optimizer._skip = decaying


def _replace_logprobs(function: object) -> None:
    from megatron_fp16rl.learner import forward, logprobs

    forward.token_logprobs = logprobs.token_logprobs = function


def without_temperature() -> None:
    from megatron_fp16rl.learner.logprobs import token_logprobs

    _replace_logprobs(
        lambda logits, targets, vocabulary, group, temperature: token_logprobs(
            logits, targets, vocabulary, group
        )
    )


def copied_to_fp32() -> None:
    def copying(logits, targets, vocabulary, group, temperature):
        scaled = logits.float() / temperature
        return scaled.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    _replace_logprobs(copying)


def sequences_not_parted() -> None:
    """Packed sequences attend to each other."""
    from megatron_fp16rl.platform.local_attention import FusedAttention

    def whole(layer, query, key, value, attention_mask, **_):
        return layer._attend(query[:, None], key[:, None], value[:, None])

    FusedAttention.forward = whole


def reduced_sums() -> None:
    """As cuBLAS does where it may: parts of a product are added in fp16."""
    linear = torch.nn.functional.linear

    def in_parts(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        parts = [linear(a, b) for a, b in zip(left.chunk(4, 1), right.chunk(4, 1), strict=True)]
        return sum(parts[1:], parts[0])

    torch.nn.functional.linear = in_parts


def rounded_logits() -> None:
    from megatron_fp16rl import platform

    here = platform.current()
    product = here.fp32_product
    here.fp32_product = lambda left, right: product(left, right).half().float()


def angles_in_half() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    rotate = rope_utils._apply_rotary_pos_emb_bshd
    rope_utils._apply_rotary_pos_emb_bshd = lambda values, freqs, **options: rotate(
        values, freqs.half().float(), **options
    )


def norms_in_bf16() -> None:
    from megatron_fp16rl.platform.local_layers import RMSNorm

    norm = torch.nn.RMSNorm.forward
    RMSNorm.forward = lambda layer, values: norm(layer, values.bfloat16()).to(values.dtype)


def attention_in_bf16() -> None:
    from megatron_fp16rl.platform.local_attention import FusedAttention

    attend = FusedAttention._attend
    FusedAttention._attend = lambda layer, *values: attend(
        layer, *(value.bfloat16() for value in values)
    ).to(values[0].dtype)


def a_checkpoint_keeps_a_copy() -> None:
    from megatron_fp16rl.learner import checkpoint

    save = checkpoint.save

    def keeping(learner, *arguments):
        learner.kept = [shard.parameter.detach().clone() for shard in learner.model.trained]
        return save(learner, *arguments)

    checkpoint.save = keeping


def plan_20_percent_off() -> None:
    from megatron_fp16rl.tools.selftest import process

    call = process.call
    process.call = lambda *given: [[int(1.2 * size) for size in sizes] for sizes in call(*given)]


def speeds() -> dict:
    """What row speed measures of a tiny learner on a CPU."""
    from megatron_fp16rl import platform

    platform.current().prepare_learner()
    from megatron_fp16rl.tools.selftest import memory, speed
    from megatron_fp16rl.tools.selftest.result import Setting

    with tempfile.TemporaryDirectory() as folder:
        both = speed.measured(memory.recipe(*memory.SMALL), Setting(True, Path(folder)), 128)
    return {"speeds": both, "checks": [check.name for check in speed.judge(*both)]}


class _Waits(TorchDispatchMode):
    """Stands in for a GPU: warns, as torch does there, where values are read or counted."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            from megatron_fp16rl.tools.selftest.waits import _SAID

            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            warnings.warn_explicit(_SAID, UserWarning, frame.f_code.co_filename, frame.f_lineno)
        return function(*args, **(kwargs or {}))


def waits_of_a_micro_batch(in_layers: bool) -> dict:
    """Where a scored and learnt micro-batch waits. in_layers: attention reads a value, too."""
    from megatron_fp16rl import platform

    platform.current().prepare_learner()
    from megatron_fp16rl.tools.selftest import models, waits

    torch.cuda.set_sync_debug_mode = lambda mode: None
    if in_layers:
        from megatron_fp16rl.platform.local_attention import FusedAttention

        forward = FusedAttention.forward

        def reading(layer, query, *rest, **options):
            assert query.sum().item() < torch.inf
            return forward(layer, query, *rest, **options)

        FusedAttention.forward = reading

    def counted(learner, count: int) -> Counter:
        step = waits._step_of(learner, count)

        def watched() -> None:
            with _Waits():
                step()

        return waits._counted(watched)

    with tempfile.TemporaryDirectory() as folder:
        models.hf_model(models.TINY["qwen3"], Path(folder))
        learner = models.learner(
            Path(folder), models.world(), "fp16", settings=models.packing(waits._TOKENS)
        )
        return waits.growth(*(counted(learner, count) for count in (2, 4)), 2)


def call(function: str, arguments: dict) -> object:
    """What a function of a row returns on a rank, in place of a process of its own."""
    module, name = function.split(".")
    return getattr(importlib.import_module(f"megatron_fp16rl.tools.selftest.{module}"), name)(
        **arguments
    )


def syncs() -> dict:
    """What fails in row sync if syncs leave out a tensor, and if none is planted; on the same servers.

    said: what it prints in the latter, in which a server hangs and one dies.
    """
    from megatron_fp16rl import platform

    platform.current().prepare_learner()
    from megatron_fp16rl.learner.export import Export
    from megatron_fp16rl.platform import nccl
    from megatron_fp16rl.rollout.server import ServerConfig
    from megatron_fp16rl.tools.selftest import models, sync
    from megatron_fp16rl.tools.selftest.result import Setting

    tensor, fail, kept = Export.tensor, sync._Syncs.fail, {}

    def stale(weights: Export, key: str) -> torch.Tensor:
        value = tensor(weights, key)
        is_left_out = key == "decoder.layers.0.mlp.linear_fc1.weight"
        return kept.setdefault(key, value.clone()) if is_left_out else value

    models.world = functools.cache(models.world)
    failed = {}
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()) as said:
        folder = Path(root) / "model"
        models.built(folder)
        launch = sync.launch_servers
        sync.launch_servers = lambda *given: contextlib.nullcontext(servers)
        config = ServerConfig("fp16", start_timeout_s=600)
        os.environ.update(nccl.agreed(config))
        with launch(config, folder, Path(root) / "logs", 2, 1) as servers:
            Export.tensor = stale
            sync._Syncs.fail = lambda syncs, clients, hurt: (0.0, clients[: len(clients) - 1])
            failed["left out"] = sync.sync(Setting(True, Path(root) / "left out"))
            Export.tensor, sync._Syncs.fail = tensor, fail
            failed["nothing"] = sync.sync(Setting(True, Path(root) / "nothing"))
    failed = {
        fault: [check.name for check in checks if not check.holds]
        for fault, checks in failed.items()
    }
    return {"failed": failed, "kept": list(kept), "said": said.getvalue()}
