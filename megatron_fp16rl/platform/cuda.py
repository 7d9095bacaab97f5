"""Megatron-core and SGLang on NVIDIA GPUs: mostly their own defaults.

Nothing here runs without a GPU; docs/gpu-checklist.md lists what to confirm on one.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from megatron_fp16rl.platform import local_layers, te_attention
from megatron_fp16rl.platform.installed import kernels
from megatron_fp16rl.utils.cache import kernel_caches

if TYPE_CHECKING:  # Megatron is imported after prepare_learner
    from megatron.core.transformer import TransformerConfig

NAME = "cuda"
COLLECTIVES = "nccl"
# cuDNN's attention is planned for each shape, 60 ms to a second each, and keeps the plans for ever
# (Transformer Engine 2.18, fused_attn_f16_arbitrary_seqlen.cu). This costs some 3 % of the tokens.
PAD_TO_MULTIPLE_OF = 256
SENT_ALONE = 32 << 20  # bytes: copies are nearly free here, and short messages slow
_learner_only: dict[str, str] = {}  # environment variables that servers must not inherit


def device() -> torch.device:
    """The GPU of this rank: the only one it sees, where a site gives each task its own, else by LOCAL_RANK.

    Raises RuntimeError if it sees several and has none of them.
    """
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if visible == 1:
        return torch.device("cuda", 0)
    if 0 < visible <= local:
        raise RuntimeError(
            f"rank {local} of this machine sees {visible} GPUs: start no more ranks a machine than it has "
            "(learner.ranks, slurm.learner_nodes), or let each see all (CUDA_VISIBLE_DEVICES)"
        )
    return torch.device("cuda", local)


def describe() -> str:
    adam = {"transformer_engine": "TE FusedAdam", "apex": "apex FusedAdam", "torch": "torch AdamW"}
    layers = "Transformer Engine layers" if kernels() == "transformer_engine" else "local layers"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    cudnn = cudnn_name(torch.backends.cudnn.version())
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}, NCCL {nccl}"
    return f"CUDA, NCCL, {layers}, {adam[kernels()]}; {versions}"


def cudnn_name(version: int) -> str:
    """91002 is 9.10.2."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def attention(config: "TransformerConfig", dtype: torch.dtype, tokens: int, packed: bool) -> str:
    """The kernel of the layers' attention; see te_attention.py, and for "torch" local_attention.py."""
    if kernels() != "transformer_engine":
        return "torch"
    return te_attention.kernel(config, dtype, tokens, packed)


def prepare_learner() -> None:
    os.environ.update(kernel_caches())
    _learner_only.update(allocator(os.environ))
    os.environ.update(_learner_only)
    torch.cuda.set_device(device())
    sum_products_in_fp32()


def allocator(given: Mapping[str, str]) -> dict[str, str]:
    """Adds to the environment `given` what keeps micro-batches of many sizes from fragmenting memory.

    torch reads it at its first allocation. For learners only: SGLang's memory saver and its all-reduce
    between processes want memory of another kind.
    """
    if "PYTORCH_ALLOC_CONF" in given or "PYTORCH_CUDA_ALLOC_CONF" in given:  # torch 2.13 knows both
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def prepare_sglang() -> None:
    sum_products_in_fp32()


prepare_server = prepare_sglang


def sum_products_in_fp32() -> None:
    """Has cuBLAS add up the parts of a split matrix product in fp32; torch's default is the product's dtype.

    Products are split where rows are few and sums long, as in decoding. In fp16 the sum of the parts
    overflows at 65,504 and is rounded once more, and the learner, which has more rows, is not rounded
    alike. bf16 too, or a comparison of the two dtypes would compare this setting.
    """
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def transformer_options() -> dict[str, Any]:
    """Fusions that round as SGLang's kernels do; those that need a library only where it is installed."""
    transformer_engine = kernels() == "transformer_engine"
    return {
        # Megatron's own layers need apex for it; Transformer Engine's do without, see learner/model.py.
        "gradient_accumulation_fusion": bool(
            importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
        ),
        # silu(gate) * up is rounded once, as in SGLang's silu_and_mul; unfused it is rounded twice.
        "bias_activation_fusion": True,
        # Angles' cosines and sines stay fp32, as in SGLang on a GPU; unfused they are rounded to fp16.
        "apply_rope_fusion": transformer_engine,
        "masked_softmax_fusion": False,
        "moe_grouped_gemm": transformer_engine,
        # One kernel in place of masked_select, which waits for the GPU; the sum over a token's experts
        # is fp32.
        "moe_permute_fusion": transformer_engine,
        "persist_layer_norm": False,
    }


def layer_spec(config: "TransformerConfig", vp_stage: int | None) -> Any:
    """Transformer Engine's layers when installed, else Megatron's local ones."""
    if kernels() != "transformer_engine":
        return local_layers.block_spec(config, vp_stage)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megatron_fp16rl.platform.delta_net import put_delta_nets

    block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    if config.fp32_residual_connection:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        local_layers.norm_stream_in_fp32(block, TEColumnParallelLinear)
    put_delta_nets(block, config, vp_stage)
    return block


def tune_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """torch's AdamW gets its fused kernel; the FusedAdams of TE and apex are fused already."""
    if kernels() == "torch":
        for group in optimizer.param_groups:
            group["fused"] = True


def fp32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """On tensor cores. Two 16-bit matrices as in SGLang (layers/logits_processor.py, 0.5.23), without a copy.

    Of a gradient, which is fp32, TF32 keeps as many bits as fp16 has, in the range of fp32; of the other, which
    has 16 bits or had, it keeps all.
    """
    if left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        return torch.mm(left.float(), right.float())
    finally:
        matmul.allow_tf32 = before


def server_arguments() -> list[str]:
    """SGLang's default backends."""
    return []


def server_environment(first: int, count: int) -> dict[str, str]:
    """Gives a server `count` GPUs of this machine, from the `first` on; learner ranks have those before.

    Raises RuntimeError where the machine has too few.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    assigned = devices[first : first + count]
    if len(assigned) < count:
        bound = len(devices) == 1 and "SLURM_PROCID" in os.environ
        raise RuntimeError(
            f"the run needs {first + count} GPUs (learner.ranks + rollout.servers x "
            f"rollout.tensor_parallel), but {len(devices)} are visible"
            + (
                "; Slurm gives each task one of its own (--gpus-per-task, --gpu-bind), and no task may "
                "choose: ask for whole nodes, slurm.gpus_per_node or slurm.gres"
                if bound
                else ""
            )
        )
    # A benchmark's learner starts servers itself, which inherit; torch takes "" for its defaults.
    return {"CUDA_VISIBLE_DEVICES": ",".join(assigned), **dict.fromkeys(_learner_only, "")}
