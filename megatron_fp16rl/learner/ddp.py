"""Data parallelism: Megatron's DDP around the model chunks, and what overlaps with the passes.

`learner.ddp` may ask for three kinds of overlap. All leave the numbers of an update as they are:

    overlap_grad_reduce     a bucket's gradients are reduced while those before it are computed
    overlap_param_gather    of the distributed optimizer: the next forward pass gathers a bucket's updated
                            parameters before the first module that needs them
    align_param_gather      all stages gather at once, where the interleaved schedule says so
"""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig


def wrap(
    config: TransformerConfig,
    chunks: list[torch.nn.Module],
    distributed_optimizer: bool,
    options: dict[str, Any],
) -> list[DistributedDataParallel]:
    """Each model chunk in DDP; and `config` tells Megatron's schedules when to reduce and to gather.

    options: DistributedDataParallelConfig values of the recipe.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,  # Megatron forces it for bf16 only
        use_distributed_optimizer=distributed_optimizer,
        check_for_nan_in_grad=False,  # an overflow is the loss scaler's business
        **options,
    )
    # The rest follows Megatron-LM 0.16.1's training.py. Chunks after the first reduce while others compute,
    # and need no buckets for that.
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]

    def of_chunks(functions: list[Any]) -> Any:
        return functions if len(functions) > 1 else functions[0]

    if ddp.overlap_grad_reduce:
        # Not before the last micro-batch; and later stages at the moment when the first one does.
        config.no_sync_func = of_chunks([chunk.no_sync for chunk in wrapped])
        config.grad_sync_func = of_chunks([chunk.start_grad_sync for chunk in wrapped])
    if ddp.align_param_gather:
        config.param_sync_func = of_chunks([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Gathers what an update left to the next forward pass: readers of parameters need all of them.

    Collective over the world. After a skipped update it gathers the parameters as they were.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
