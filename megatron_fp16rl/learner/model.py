"""Builds Megatron's GPT model from a Hugging Face configuration; names and places of its weights there."""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from megatron_fp16rl import platform
from megatron_fp16rl.learner import ddp, workarounds
from megatron_fp16rl.learner.lora import Adapter, attach
from megatron_fp16rl.learner.output_layer import multiply_in_fp32
from megatron_fp16rl.models.families.family import Rule
from megatron_fp16rl.models.layouts import runs
from megatron_fp16rl.models.parts import Part, contiguous
from megatron_fp16rl.models.spec import ModelSpec
from megatron_fp16rl.parallel import Axis, World
from megatron_fp16rl.recipe import TORCH_DTYPES, Head, Lora, RecipeError

_EXPERT_NUMBER = re.compile(
    r"(experts\.local_experts\.|experts\.linear_fc[12]\.(?:weight|bias))(\d+)"
)

HFTensors = list[tuple[str, torch.Size]]  # names and global shapes of Hugging Face tensors


@dataclass(frozen=True)
class Shard:
    """This rank's shard of one parameter (or buffer), under its global name.

    A global name is Megatron's, with layers counted over all stages and experts over all ranks.
    """

    name: str
    parameter: torch.Tensor

    @property
    def is_expert(self) -> bool:
        return is_expert(self.name)

    @property
    def main_grad(self) -> torch.Tensor:
        """The accumulated gradient of a trained parameter, fp32, in DDP's buffer."""
        return self.parameter.main_grad  # type: ignore[attr-defined]

    @property
    def kind(self) -> str:
        """Part of an "expert", of an "embedding" (the output layer is one), an "adapter", or "dense"."""
        if self.is_expert:
            return "expert"
        if "_lora." in self.name:
            return "adapter"
        return "embedding" if self.name.startswith(("embedding.", "output_layer.")) else "dense"


def is_expert(name: str) -> bool:
    """Whether a parameter of a global name belongs to one expert."""
    return ".experts." in name


class Shards:
    """This rank's shards of one kind, in Megatron's order.

    by_chunk  [model chunk][shard]
    stages    [stage][model chunk][shard]: names and shapes of each pipeline stage; None until a gather
    """

    def __init__(self, by_chunk: list[list[Shard]]) -> None:
        self.by_chunk = by_chunk
        self.stages: list[list[list[tuple[str, tuple[int, ...]]]]] | None = None

    def __iter__(self) -> Iterator[Shard]:
        return itertools.chain(*self.by_chunk)


class Model:
    """A GPT model wrapped for mixed precision and data parallelism.

    gpt_models  this rank's GPTModels: one, or as many as the layout has model_chunks
    chunks      the same wrapped in DDP, as Megatron's schedules take them
    weights     parameters of the model itself
    buffers     what has no gradient but belongs to the weights: fp32 in every precision
    adapters    parameters of the LoRA adapters; none without `lora`
    trained     adapters if there are any, else weights: what has gradients and an optimizer
    frozen      the other of the two
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: str,
        world: World,
        distributed_optimizer: bool = False,
        options: dict[str, Any] | None = None,
        lora: Lora | None = None,
        ddp_options: dict[str, Any] | None = None,
        head: Head = None,
    ) -> None:
        """options: TransformerConfig values of the recipe, which override ours; ddp_options: see ddp.wrap.

        lora: adapters to train instead of the weights. Raises RecipeError if the model cannot have them.
        """
        options = options or {}
        self.fp32_head = head == "fp32" and dtype != "fp32"
        self.spec, self.world, self.lora = spec, world, lora
        self.distributed_optimizer = distributed_optimizer
        self.dtype: torch.dtype = getattr(torch, TORCH_DTYPES[dtype])
        workarounds.say_less()
        workarounds.rotate_packed_sequences()
        workarounds.project_queries_as_they_are()
        self.config = self._transformer_config(options)
        self.gpt_models = [self._build(chunk) for chunk in range(world.layout.model_chunks)]
        # Before the wrappers: these cast, and allocate gradients for, every parameter they find.
        self.adapter_of = self._attach_adapters()
        wrapped = self.gpt_models
        if dtype != "fp32":
            wrapped = [Float16Module(self.config, gpt) for gpt in self.gpt_models]
        for gpt in self.gpt_models:
            workarounds.keep_router_buffers_in_fp32(gpt)
            if options.get("gradient_accumulation_fusion", True):
                workarounds.accumulate_in_fp32(gpt)
        self.chunks = ddp.wrap(self.config, wrapped, distributed_optimizer, ddp_options or {})
        parameters = [self._shards(gpt, gpt.named_parameters()) for gpt in self.gpt_models]
        self.weights = Shards([[s for s in c if s.kind != "adapter"] for c in parameters])
        self.adapters = Shards([[s for s in c if s.kind == "adapter"] for c in parameters])
        buffers = [self._shards(gpt, gpt.named_buffers()) for gpt in self.gpt_models]
        self.buffers = Shards(
            [[s for s in c if s.name.endswith("router.expert_bias")] for c in buffers]
        )
        self.trained = self.adapters if lora else self.weights
        self.frozen = self.weights if lora else self.adapters

    def _build(self, chunk: int) -> GPTModel:
        spec, pipeline = self.spec, self.world.pipeline
        chunks = self.world.layout.model_chunks
        vp_stage = chunk if chunks > 1 else None
        stage = chunk * pipeline.size + pipeline.rank
        gpt = GPTModel(
            config=self.config,
            transformer_layer_spec=platform.current().layer_spec(self.config, vp_stage),
            vocab_size=spec.shapes.padded_vocabulary,
            max_sequence_length=spec.max_positions,
            pre_process=stage == 0,
            post_process=stage == chunks * pipeline.size - 1,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="yarn" if spec.yarn else "rope",
            rotary_base=spec.rope_base,
            rotary_percent=spec.rope_fraction,
            rope_scaling=spec.rope_scaling_factor is not None,
            rope_scaling_factor=spec.rope_scaling_factor or 8.0,
            vp_stage=vp_stage,
        )
        if self.fp32_head and gpt.post_process:
            multiply_in_fp32(gpt.output_layer)
        return gpt.to(self.world.device)

    def _transformer_config(self, options: dict[str, Any]) -> TransformerConfig:
        if self.spec.yarn and options.get("apply_rope_fusion"):
            raise RecipeError(
                "learner.megatron.apply_rope_fusion: true would leave YaRN's factor out of packed sequences "
                "(Megatron-core 0.19.2); remove it"
            )
        layout, latent = self.world.layout, self.spec.latent_attention
        chunks = layout.model_chunks
        values = {
            "activation_func": torch.nn.functional.silu,
            "params_dtype": self.dtype,
            "pipeline_dtype": torch.float32
            if options.get("fp32_residual_connection")
            else self.dtype,
            "fp16": self.dtype is torch.float16,
            "bf16": self.dtype is torch.bfloat16,
            "attention_softmax_in_fp32": True,
            "perform_initialization": False,  # values are loaded
            "tensor_model_parallel_size": layout.tensor_parallel,
            "sequence_parallel": layout.sequence_parallel,
            "context_parallel_size": layout.context_parallel,
            "pipeline_model_parallel_size": layout.pipeline_parallel,
            "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
            "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
            "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
            "expert_model_parallel_size": layout.expert_parallel,
            "expert_tensor_parallel_size": layout.expert_tensor_parallel,
            # The interleaved schedule needs equal shapes: with two ranks, each is both next and
            # previous of the other, and Megatron 0.19.2 exchanges shapes in the wrong order. Tensors
            # go one by one for the same reason.
            "variable_seq_lengths": layout.pipeline_parallel > 1 and chunks == 1,
            "batch_p2p_comm": chunks == 1,
            # Megatron requires this dispatcher where lengths vary, even of dense models.
            "moe_token_dispatcher_type": "alltoall",
            "finalize_model_grads_func": finalize_model_grads,
            **platform.current().transformer_options(),
            **self.spec.transformer,
        }
        if latent:  # Megatron's fused rope of latent attention supports YaRN only
            values["apply_rope_fusion"] = False
        kind = MLATransformerConfig if latent else TransformerConfig
        _check_known(options, kind)
        config = kind(**{**values, **options})
        for name, value in self.spec.yarn.items():
            setattr(
                config, name, value
            )  # GPTModel looks for them, and the class has no such fields
        return config

    def _attach_adapters(self) -> dict[torch.Tensor, Adapter]:
        """Freezes the model and attaches LoRA adapters; returns these by the weight they belong to."""
        attached: dict[torch.Tensor, Adapter] = {}
        if self.lora is None:
            return attached
        for gpt in self.gpt_models:
            rules = [
                (name, self.spec.family.find(self.global_name(gpt, name)))
                for name, _ in gpt.named_parameters()
            ]
            attached.update(attach(gpt, rules, self.spec, self.lora, self.world))
        return attached

    # Names: what a shard is in the whole model, and in Hugging Face's

    def _shards(self, gpt: GPTModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Shard]:
        return [Shard(self.global_name(gpt, name), tensor) for name, tensor in tensors]

    def global_name(self, gpt: GPTModel, name: str) -> str:
        if layer := re.match(r"decoder\.layers\.(\d+)", name):
            number = gpt.decoder.layers[int(layer[1])].layer_number - 1
            name = f"decoder.layers.{number}{name[layer.end() :]}"
        return self.with_expert_of(self.world.expert.rank, name)

    def with_expert_of(self, rank: int, name: str) -> str:
        """Replaces the expert's index, local or global, by the global one on expert-parallel rank `rank`."""

        def renumber(match: re.Match[str]) -> str:
            local = self.config.num_moe_experts // self.world.expert.size
            return f"{match[1]}{int(match[2]) % local + local * rank}"

        return _EXPERT_NUMBER.sub(renumber, name)

    def rule(self, name: str) -> Rule:
        """How the family maps a shard, by its global name, to Hugging Face tensors."""
        return self.spec.family.find(self.canonical_name(name))

    def canonical_name(self, name: str) -> str:
        """A shard's name; for the last stage's copy of a tied embedding, that of the embedding."""
        return "embedding.word_embeddings.weight" if self.is_tied_copy(name) else name

    def is_tied_copy(self, name: str) -> bool:
        """Whether this is the last stage's copy of an embedding that the first stage holds."""
        return self.spec.tied and name == "output_layer.weight"

    def tensor_axis(self, shard: Shard) -> Axis:
        """The ranks that together hold one full tensor."""
        return self.world.expert_tensor if shard.is_expert else self.world.tensor

    def replicas_of(self, shard: Shard) -> Axis:
        """The ranks that hold the same shard."""
        return self.world.expert_data if shard.is_expert else self.world.data_context

    def hf_tensors(self, shard: Shard) -> HFTensors:
        """Hugging Face names and global shapes exported for a shard, peer experts of its EP group included.

        None for a tied copy: the first stage exports the embedding.
        """
        if self.is_tied_copy(shard.name):
            return []
        rule, local = self.rule(shard.name), torch.empty(shard.parameter.shape, device="meta")
        tensors = rule.layout.join([local] * self.tensor_axis(shard).size, self.spec.shapes)
        if rule.expert is not None:
            count = self.config.num_moe_experts
            return [(rule.hf[0], torch.Size((count, *tensors[0].shape)))]
        ranks = range(self.world.expert.size if shard.is_expert else 1)
        names = [self.spec.family.find(self.with_expert_of(r, shard.name)).hf for r in ranks]
        return [
            (name, tensor.shape)
            for of_rank in names
            for name, tensor in zip(of_rank, tensors, strict=True)
        ]

    def hf_parts(self, shard: Shard, rank: int) -> list[Part]:
        """The parts of Hugging Face tensors in a shard as tensor-parallel rank `rank` has it; a key is its name.

        What is the same on every rank counts as rank 0's.
        """
        rule, axis = self.rule(shard.name), self.tensor_axis(shard)
        shape = tuple(shard.parameter.shape)
        dim, strides = rule.layout.dim, contiguous(shape)
        assert shard.parameter.is_contiguous(), shard.name
        if rule.expert is not None:  # a whole expert, whose matrices are transposed there
            first, sizes = (rule.expert, *(0 for _ in shape)), (1, *shape[::-1])
            return [Part(rule.hf[0], first, sizes, shard.name, 0, (0, *strides[::-1]))]
        sources = runs(rule.layout, shape[dim], len(shape), axis.size, self.spec.shapes)
        found = []
        for name, of_tensor in zip(rule.hf, sources, strict=True):
            for run in of_tensor:
                if run.rank == rank:
                    start = tuple(run.at if d == dim else 0 for d in range(len(shape)))
                    box = tuple(run.length if d == dim else size for d, size in enumerate(shape))
                    at = run.start * strides[dim]
                    found.append(Part(name, start, box, shard.name, at, strides))
        return found

    @torch.no_grad()
    def set_adapters(self, value: Callable[[str, torch.Size], torch.Tensor]) -> None:
        """Fills the adapters with `value(Hugging Face name, global shape)`."""
        for shard in self.adapters:
            ((name, shape),) = self.hf_tensors(shard)
            axis, layout = self.tensor_axis(shard), self.rule(shard.name).layout
            parts = layout.split([value(name, shape)], axis.size, self.spec.shapes)
            shard.parameter.copy_(parts[axis.rank])


def largest_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, fp32; nan if there is a nan. One pass, and nothing is copied."""
    if not tensor.numel():
        return torch.zeros((), device=tensor.device)
    low, high = tensor.detach().aminmax()
    return torch.maximum(-low, high).float()


def _check_known(options: dict[str, Any], kind: type[TransformerConfig]) -> None:
    """Raises RecipeError for an option of learner.megatron that the class has not."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise RecipeError(
                f"learner.megatron.{name} is no option of Megatron-core 0.19.2's {kind.__name__}; "
                + (f"did you mean {near[0]}?" if near else "remove it")
            )
