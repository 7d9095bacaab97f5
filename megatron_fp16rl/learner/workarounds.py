"""What megatron-core 0.16.1 and Transformer Engine 2.11 leave wrong in a model that is just built.

Each has a test that fails without it (tests/ranks).
"""

from collections.abc import Iterable

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import Router


def keep_router_buffers_in_fp32(gpt: GPTModel) -> None:
    """Undoes Float16Module's cast, before weights are loaded.

    megatron-core 0.16.1 restores the expert bias only at the first forward pass, when its bits are
    lost, and never the count of tokens, which fp16 keeps exactly up to 2,048 only.
    """
    for module in gpt.modules():
        if isinstance(module, Router):
            for buffer in module.buffers():
                buffer.data = buffer.data.float()


def mark_experts(gpt: GPTModel) -> None:
    """Makes gradients of experts be summed over the ranks that hold the same experts.

    megatron-core 0.16.1 treats experts as dense parameters where expert_parallel is 1, even if they
    are replicated over tensor-parallel ranks, which have different tokens: the replicas drift apart.
    """
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def accumulate_in_fp32(gpt: GPTModel) -> None:
    """Makes Transformer Engine's layers add a micro-batch's weight gradients to the fp32 ones unrounded.

    Megatron's option for it requires apex, for its own layers (tensor_parallel/layers.py of megatron-core
    0.16.1). The output layer is one of those: its gradients pass through the model's dtype as without
    Transformer Engine, and so do those of an embedding tied to it.
    """
    for module in gpt.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def mark_replicated(parameters: Iterable[torch.Tensor]) -> None:
    """Makes weights that every tensor-parallel rank holds in full count once in the gradient norm.

    Transformer Engine 2.11 marks the weights of all its linear layers as sharded (module/linear.py), also
    those that Megatron replicates: latent attention's down projections. megatron-core 0.16.1 goes by
    the mark (param_is_not_tensor_parallel_duplicate).
    """
    for parameter in parameters:
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
