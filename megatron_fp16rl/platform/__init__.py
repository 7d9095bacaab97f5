"""What differs between a CPU and a GPU machine; no other module asks which one it is.

`cpu` and `cuda` define the same names; `meta`, for plans, those that a learner uses:
    NAME, COLLECTIVES              "cpu"/"cuda"/"meta"; the torch.distributed backend
    PAD_TO_MULTIPLE_OF             tokens of a padded sequence, unless the recipe says otherwise
    SENT_ALONE                     bytes of a part of the weights that is sent without copying it first
    device()                       of this rank's tensors
    prepare_learner()              before Megatron-core is imported
    prepare_server(), prepare_sglang()   before SGLang is imported, as a server or as a library
    layer_spec(config, vp_stage)   Megatron's specification of a pipeline stage's layers
    transformer_options()          TransformerConfig values for this machine
    tune_optimizer(optimizer)      selects the kernels that step the parameters
    fp32_product(left, right)      of 16-bit matrices, or a gradient in fp32 and one; see learner/output_layer.py
    server_arguments(), server_environment(first, count)   for sglang.launch_server
    attention(config, dtype, tokens, packed)   name of the attention kernel; None: does not matter
    describe()                     one line for the run's log
`nccl` has the settings on which all ranks of a weight sync must agree.
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
