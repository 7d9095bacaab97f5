"""Building Megatron's GPT model from a Hugging Face configuration, filling it, emptying it."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fp16rl import platform
from megatron_fp16rl.learner.world import World
from megatron_fp16rl.recipe import TORCH_DTYPES
from megatron_fp16rl.weights.families import ModelSpec
from megatron_fp16rl.weights.folder import HFFolder

FP16_MAX = 65504.0
_IGNORED_HF = ("rotary_emb.inv_freq",)  # derived from the configuration; old folders hold it


class WeightRangeError(RuntimeError):
    """A weight that fp16 cannot hold, or that is not finite."""


class Model:
    """A GPT model wrapped for mixed precision and data parallelism.

    chunks    what Megatron's schedules take: one DDP module
    core      the GPTModel inside
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: str,
        world: World,
        distributed_optimizer: bool = False,
        options: dict[str, object] | None = None,
    ) -> None:
        """options: TransformerConfig values of the recipe; they win over ours."""
        self.spec, self.world = spec, world
        self.dtype = getattr(torch, TORCH_DTYPES[dtype])
        self.config = self._transformer_config(options or {})
        self.core = GPTModel(
            config=self.config,
            transformer_layer_spec=platform.current().layer_spec(self.config, spec.family.qk_norm),
            vocab_size=spec.shapes.padded_vocabulary,
            max_sequence_length=spec.max_positions,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="rope",
            rotary_base=spec.rope_base,
            rope_scaling=spec.rope_scaling_factor is not None,
            rope_scaling_factor=spec.rope_scaling_factor or 8.0,
        )
        self.core.to(world.device)
        half = Float16Module(self.config, self.core) if dtype != "fp32" else self.core
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,  # Megatron forces it for bf16 only
            use_distributed_optimizer=distributed_optimizer,
            check_for_nan_in_grad=False,  # an overflow is the loss scaler's business
        )
        self.chunks = [DistributedDataParallel(self.config, ddp, half)]

    def _transformer_config(self, options: dict[str, object]) -> TransformerConfig:
        return TransformerConfig(
            **{
                **self.spec.transformer,
                "activation_func": torch.nn.functional.silu,
                "params_dtype": self.dtype,
                "pipeline_dtype": self.dtype,
                "fp16": self.dtype is torch.float16,
                "bf16": self.dtype is torch.bfloat16,
                "attention_softmax_in_fp32": True,
                # Not for the values, which are loaded: with it off, megatron-core 0.16.1 leaves
                # `tensor_model_parallel` unset on its weights, and takes shards for replicas when
                # it sums the gradient norm (1.28 instead of 1.81 at TP 2).
                "perform_initialization": True,
                "tensor_model_parallel_size": self.world.tensor_parallel,
                "finalize_model_grads_func": finalize_model_grads,
                **platform.current().transformer_options(),
                **options,
            }
        )

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Megatron's parameters by name, in Megatron's order."""
        return self.core.named_parameters()

    @torch.no_grad()
    def load(self, folder: HFFolder) -> None:
        """Fills this rank's shards from a Hugging Face folder.

        Raises ValueError for tensors that are missing, left over or of another shape, and
        WeightRangeError for what the model's dtype cannot hold.
        """
        used: set[str] = set()
        for name, parameter in self.parameters():
            hf_names, layout = self.spec.family.find(name)
            tensors = []
            for hf_name in hf_names:
                tensor = folder.read(hf_name)
                _check_range(hf_name, tensor, self.dtype, str(folder.path))
                tensors.append(tensor)
            used.update(hf_names)
            shard = layout.split(tensors, self.world.tensor_parallel, self.spec.shapes)[
                self.world.tensor_rank
            ]
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{folder.path}: {', '.join(hf_names)} make a shard of {tuple(shard.shape)}, but "
                    f"its config.json asks for {tuple(parameter.shape)}"
                )
            parameter.copy_(shard)
        left = [n for n in folder.names() if n not in used and not n.endswith(_IGNORED_HF)]
        if self.spec.tied:
            left = [n for n in left if n != "lm_head.weight"]
        if left:
            raise ValueError(
                f"{folder.path}: no parameter of the model takes {', '.join(left[:5])}"
            )

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (Hugging Face name, tensor) in a fixed order, in the model's dtype.

        Collective over the tensor-parallel group; every rank yields every tensor. One parameter is
        gathered at a time. Raises WeightRangeError, on all ranks and before the first tensor, if a
        weight is not finite.
        """
        self._check_finite()
        for name, parameter in self.parameters():
            hf_names, layout = self.spec.family.find(name)
            shards = self._gather(parameter)
            yield from zip(hf_names, layout.join(shards, self.spec.shapes), strict=True)

    def _gather(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        if self.world.tensor_parallel == 1:
            return [parameter.detach()]
        shards = [torch.empty_like(parameter) for _ in range(self.world.tensor_parallel)]
        dist.all_gather(shards, parameter.detach().contiguous(), group=self.world.tensor_group)
        return shards

    def _check_finite(self) -> None:
        bad = [n for n, p in self.parameters() if not torch.isfinite(p).all()]
        count = torch.tensor([float(len(bad))], device=self.world.device)
        dist.all_reduce(count)
        if count.item():
            here = f"; on rank {self.world.rank}: {', '.join(bad[:5])}" if bad else ""
            raise WeightRangeError(
                f"{int(count.item())} parameter shard(s) hold values that are not finite in "
                f"{self.dtype}{here}. Nothing was published; the servers keep the last good version"
            )


def load_config(folder: str | Path) -> object:
    """The transformers configuration of a folder. Raises ValueError where there is none."""
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} has no config.json: it is not a Hugging Face folder")
    return AutoConfig.from_pretrained(folder)


def _check_range(name: str, tensor: torch.Tensor, dtype: torch.dtype, where: str) -> None:
    limit = torch.finfo(dtype).max
    highest = tensor.abs().max().float().item() if tensor.numel() else 0.0
    if not highest <= limit:
        raise WeightRangeError(
            f"{where}: {name} reaches {highest:g}, which {dtype} (largest number {limit:g}) cannot "
            "hold; train this model with precision: bf16"
        )
