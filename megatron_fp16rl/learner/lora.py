"""Low-rank adapters (LoRA, arXiv 2106.09685) beside Megatron's linear layers, which are frozen.

A linear layer W of Hugging Face's model computes W x + alpha / rank * B (A x). A is [rank, in] and
random, B is [out, rank] and zero at first. Megatron fuses q, k, v and gate, up into one layer; each of
them keeps its own A and B, as in PEFT's files.

Tensor parallelism shards B where it shards the rows of W, or A where it shards the columns; the other
matrix is replicated. What crosses the ranks is A x, of `rank` numbers a token:

    W sharded by rows      A x is the same on all ranks; its gradient, one share a rank, is summed
    W sharded by columns   A x is a share on each rank, and is summed; its gradient is the same on all

So the gradient of the replicated matrix is complete on every rank, and equal. Under sequence parallelism
it covers this rank's tokens only: marked like Megatron's norms, it is summed over the ranks with theirs.
"""

import random
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import mappings, set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from megatron_fp16rl.models.families.family import Rule
from megatron_fp16rl.models.layouts import Cut, Shapes
from megatron_fp16rl.models.spec import ModelSpec
from megatron_fp16rl.parallel import Axis, World
from megatron_fp16rl.recipe import Lora, RecipeError

_MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")


def attach(
    core: GPTModel, rules: list[tuple[str, Rule]], spec: ModelSpec, lora: Lora, world: World
) -> dict[torch.Tensor, "Adapter"]:
    """Freezes a model and gives it adapters; returns them by the weight that each belongs to.

    rules: names of the model's parameters, and how they map. Raises RecipeError for a model whose
    targets cannot have adapters.
    """
    _check(spec, lora)
    core.requires_grad_(False)
    if core.pre_process:
        core.embedding.register_forward_hook(_require_gradients)
    size = world.tensor.size
    shapes = replace(
        spec.shapes, heads=spec.shapes.heads // size, groups=spec.shapes.groups // size
    )
    adapters: dict[torch.Tensor, Adapter] = {}
    for name, rule in rules:
        if not any(_module(hf) in lora.targets and hf.endswith(".weight") for hf in rule.hf):
            continue
        path = name.removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        linear = core.get_submodule(path)
        adapter = Adapter(linear, rule, shapes, lora, world.tensor, core.config)
        # Beside the layer, not in it: so the layer's parameters keep their names.
        core.get_submodule(parent).add_module(f"{leaf}_lora", adapter)
        linear.register_forward_hook(adapter.add)
        adapters[linear.weight] = adapter
    return adapters


def _check(spec: ModelSpec, lora: Lora) -> None:
    if spec.latent_attention or spec.shapes.delta:
        kind = "gated delta nets" if spec.shapes.delta else "latent attention"
        raise RecipeError(f"learner.lora: models with {kind} are not supported; remove it")
    in_experts = [target for target in lora.targets if target in _MLP_TARGETS]
    if in_experts and "num_moe_experts" in spec.transformer:
        left = [target for target in lora.targets if target not in _MLP_TARGETS]
        raise RecipeError(
            f"learner.lora.targets: {', '.join(in_experts)} of this model are in experts, which cannot "
            f"have adapters; use [{', '.join(left or ['q_proj', 'k_proj', 'v_proj', 'o_proj'])}]"
        )


def initial(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """The initial full matrix of an adapter, fp32: as in PEFT, and the same at every layout.

    A is uniform within 1 / sqrt(in), B is zero. name: Hugging Face's.
    """
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(63))
    return (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5


class Adapter(torch.nn.Module):
    """The adapters of one of Megatron's linear layers.

    Parameters are q_proj_A, q_proj_B, ...: of each target in the layer, in Hugging Face's words.
    """

    def __init__(
        self,
        linear: torch.nn.Module,
        rule: Rule,
        shapes: Shapes,
        lora: Lora,
        axis: Axis,
        config: TransformerConfig,
    ) -> None:
        """shapes: the numbers of a tensor-parallel rank's share of the model."""
        super().__init__()
        self.layout, self.shapes, self.axis = rule.layout, shapes, axis
        self.scale = lora.alpha / lora.rank
        self.columns_sharded = rule.layout == Cut(1)
        self.sequence_parallel = config.sequence_parallel
        # Transformer Engine keeps the norm before a linear layer inside of it.
        self.norm = [getattr(linear, "layer_norm_weight", None)]  # in a list: not our parameter
        self.epsilon = config.layernorm_epsilon
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        parts = rule.layout.join([torch.empty(weight.shape, device="meta")], shapes)
        self.rows = {_module(hf): len(part) for hf, part in zip(rule.hf, parts, strict=True)}
        self.targets = [module for module in self.rows if module in lora.targets]
        self.rank = lora.rank
        self.sharded_dims: dict[str, int] = {}  # of the sharded matrices: the dimension
        for module in self.targets:
            self._add(f"{module}_A", (lora.rank, weight.shape[1]), weight, self.columns_sharded, 1)
            self._add(
                f"{module}_B", (self.rows[module], lora.rank), weight, not self.columns_sharded, 0
            )

    def _add(
        self, name: str, shape: tuple[int, int], like: torch.Tensor, is_sharded: bool, dim: int
    ) -> None:
        parameter = torch.nn.Parameter(like.new_zeros(shape))
        set_tensor_model_parallel_attributes(parameter, is_sharded, dim if is_sharded else -1, 1)
        parameter.sequence_parallel = self.sequence_parallel and not is_sharded  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)
        if is_sharded:
            self.sharded_dims[name] = dim

    def add(
        self, linear: torch.nn.Module, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """The linear layer's output (and bias) with that of the adapters: a forward hook."""
        return output[0] + self(inputs[0]), *output[1:]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """alpha / rank * B (A x), in the linear layer's shapes: [seq, batch, features], sharded like its output."""
        (norm,) = self.norm
        if norm is not None:
            inputs = torch.nn.functional.rms_norm(inputs, norm.shape, norm, self.epsilon)
        low = torch.nn.functional.linear(inputs, self._inner()) * self.scale
        return torch.nn.functional.linear(self._across(low), self._outer())

    def _across(self, low: torch.Tensor) -> torch.Tensor:
        """A x as B needs it, from this rank's share of tokens or features."""
        group = self.axis.group
        if self.columns_sharded:
            if self.sequence_parallel:
                return mappings.reduce_scatter_to_sequence_parallel_region(low, group)
            return mappings.reduce_from_tensor_model_parallel_region(low, group)
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(low, group=group)
        return mappings.copy_to_tensor_model_parallel_region(low, group)

    def _inner(self) -> torch.Tensor:
        """The A of all targets, one below the other: [targets x rank, in]."""
        return torch.cat([getattr(self, f"{module}_A") for module in self.targets])

    def _outer(self) -> torch.Tensor:
        """The B of all targets, rows as those of the fused weight: [out, targets x rank].

        A row is zero but for the columns of its own target.
        """
        width = len(self.targets) * self.rank
        blocks = []
        for module, rows in self.rows.items():
            if module not in self.targets:
                blocks.append(next(self.parameters()).new_zeros(rows, width))
                continue
            left = self.targets.index(module) * self.rank
            columns = (left, width - left - self.rank)
            blocks.append(torch.nn.functional.pad(getattr(self, f"{module}_B"), columns))
        return self.layout.split(blocks, 1, self.shapes)[0]

    @torch.no_grad()
    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's shard of W + alpha / rank * B A: summed in fp32, then in the weight's dtype."""
        merged = weight.to(torch.float32, copy=True)
        merged.addmm_(self._outer().float(), self._inner().float(), alpha=self.scale)
        return merged.to(weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's description of the matrices, for its checkpoints."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            self.sharded_dims,
            sharded_offsets,
            tp_group=self.axis.group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def _require_gradients(_: torch.nn.Module, __: object, embedded: torch.Tensor) -> torch.Tensor:
    """A recomputed layer has gradients only if an input requires them; nothing before the first does."""
    return embedded.requires_grad_() if torch.is_grad_enabled() else embedded


def _module(name: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj.weight."""
    return name.split(".")[-2]
