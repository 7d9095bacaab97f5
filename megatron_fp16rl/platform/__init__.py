"""What differs between a CPU and a GPU machine. Nothing else in this package asks.

`cpu` and `cuda` define the same names; `meta`, on which plans are made, those of them that a learner uses:
    NAME, COLLECTIVES              "cpu"/"cuda"/"meta"; the torch.distributed backend
    PAD_TO_MULTIPLE_OF             tokens of a padded sequence, where a recipe does not say
    device()                       where tensors of this rank live
    prepare_learner()              before Megatron-core is imported
    prepare_server(), prepare_sglang()   before SGLang is imported, as a server or as a library
    layer_spec(config, vp_stage)   Megatron's specification of this stage's layers
    transformer_options()          TransformerConfig values that this machine needs
    tune_optimizer(optimizer)      which kernels step the parameters
    server_arguments(), server_environment(first, count)   for sglang.launch_server
    attention(config, dtype, tokens)   the kernel of the layers' attention; None: of no importance
    describe()                     one line for the run's log
`nccl` says on what all ranks of a group that sends weights must agree.
"""

import functools
from types import ModuleType

_planning = False


def plan_only() -> None:
    """Makes `meta` the platform of this process, for good."""
    global _planning
    _planning = True
    current.cache_clear()


@functools.cache
def current() -> ModuleType:
    """The platform of this process: `cuda` where torch sees a CUDA device, otherwise `cpu`."""
    import torch

    if _planning:
        from megatron_fp16rl.platform import meta

        return meta

    if torch.cuda.is_available():
        from megatron_fp16rl.platform import cuda

        return cuda
    from megatron_fp16rl.platform import cpu

    return cpu
