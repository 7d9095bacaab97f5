"""Bytes that SGLang's own models take on a rank. For tests/ranks/test_plan.py.

Run as a process of its own: SGLang's groups and settings are global. Reads from stdin
[[configuration, tensor_parallel, ep_size], ...], prints as many numbers.
"""

import importlib
import json
import os
import sys
import tempfile

os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "false"  # it waits for the other ranks

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from megatron_fp16rl import platform
from megatron_fp16rl.models.families import FAMILIES

_MODELS = {name: family.sglang for name, family in FAMILIES.items()}


def _named(values: dict) -> dict:
    return {**values, "architectures": [_MODELS[values["model_type"]][1]]}


def shape(values: dict, tensor_parallel: int, experts: int) -> int:
    """Bytes of the parameters of rank 0."""
    import sglang.srt.runtime_context as context
    from sglang.srt.configs.update_config import adjust_tp_num_heads_if_necessary
    from sglang.srt.distributed import parallel_state
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.hf_transformers import get_config

    module, name = _MODELS[values["model_type"]]
    config = AutoConfig.for_model(**_named(values))
    served_as = FAMILIES[values["model_type"]].served_as
    keys = served_as(config) if served_as else {}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        arguments = ServerArgs(
            model_path=folder,
            device="cpu",
            dtype="float16",
            tp_size=tensor_parallel,
            ep_size=experts,
            attention_backend="torch_native",
            disable_radix_cache=True,
            json_model_override_args=json.dumps(keys),
        )
        if keys:  # SGLang has a configuration of its own
            config = get_config(folder, trust_remote_code=False, model_override_args=keys)
            adjust_tp_num_heads_if_necessary(config, tensor_parallel, True)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor_parallel)
        context.publish(
            arguments, role="scheduler", ranks=context.SpawnRanks(world_rank=0, gpu_id=None)
        )
        parallel_state.init_distributed_environment(tensor_parallel, 0, "env://", 0, "fake")
        parallel_state.initialize_model_parallel(backend="fake")
        try:
            with torch.device("meta"):
                model = getattr(importlib.import_module(f"sglang.srt.models.{module}"), name)(
                    config
                )
            return sum(p.numel() * p.element_size() for p in model.parameters())
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def main() -> None:
    platform.current().prepare_server()
    torch.set_default_dtype(torch.float16)
    new_group = dist.new_group
    dist.new_group = lambda ranks=None, *_, **__: new_group(ranks, backend="fake")
    print(json.dumps([shape(*case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
