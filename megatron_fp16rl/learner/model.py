"""Building Megatron's GPT model from a Hugging Face configuration, filling it, emptying it."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from megatron_fp16rl import platform
from megatron_fp16rl.learner.lora import Adapter, attach, initial
from megatron_fp16rl.models.folder import HFFolder, is_spare
from megatron_fp16rl.models.layouts import Replicated
from megatron_fp16rl.models.source import WeightsError
from megatron_fp16rl.models.spec import ModelSpec
from megatron_fp16rl.parallel import Axis, World
from megatron_fp16rl.recipe import TORCH_DTYPES, Lora
from megatron_fp16rl.utils.errors import FinalError

_EXPERT_NUMBER = re.compile(r"(experts\.local_experts\.|experts\.linear_fc[12]\.weight)(\d+)")

WholeTensors = list[tuple[str, torch.Size]]  # names and shapes of Hugging Face tensors


class WeightRangeError(FinalError):
    """A weight of the learner that servers cannot hold, or that is not finite."""


@dataclass(frozen=True)
class Piece:
    """This rank's shard of one parameter (or buffer), under the name it has in the whole model."""

    name: str
    parameter: torch.Tensor

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.name

    @property
    def kind(self) -> str:
        """Part of an "expert", of an "embedding" (the output layer is one), an "adapter", or "dense"."""
        if self.is_expert:
            return "expert"
        if "_lora." in self.name:
            return "adapter"
        return "embedding" if self.name.startswith(("embedding.", "output_layer.")) else "dense"


class Model:
    """A GPT model wrapped for mixed precision and data parallelism.

    cores     this rank's GPTModels: one, or as many as the layout has model_chunks
    chunks    the same as Megatron's schedules take them: in DDP
    pieces    this rank's weights, by chunk, in Megatron's order
    buffers   the same of what has no gradient but belongs to the weights: fp32 in every precision
    adapters  the same of the LoRA adapters; none without `lora`
    trained   adapters if there are any, else pieces: what has gradients and an optimizer
    frozen    the other of the two
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: str,
        world: World,
        distributed_optimizer: bool = False,
        options: dict[str, object] | None = None,
        lora: Lora | None = None,
    ) -> None:
        """options: TransformerConfig values of the recipe; they win over ours.

        lora: adapters to be trained instead of the weights. Raises RecipeError if the model cannot
        have them.
        """
        self.spec, self.world, self.lora = spec, world, lora
        self.distributed_optimizer = distributed_optimizer
        self.dtype = getattr(torch, TORCH_DTYPES[dtype])
        self.config = self._transformer_config(options or {})
        self.cores = [self._build(i) for i in range(world.layout.model_chunks)]
        self._adapter_of = self._attach_adapters()
        halves = (
            [Float16Module(self.config, c) for c in self.cores] if dtype != "fp32" else self.cores
        )
        for core in self.cores:
            _keep_router_buffers_in_fp32(core)
            _mark_experts(core)
            self._mark_whole(core)
            if (options or {}).get("gradient_accumulation_fusion", True):
                _accumulate_in_fp32(core)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,  # Megatron forces it for bf16 only
            use_distributed_optimizer=distributed_optimizer,
            check_for_nan_in_grad=False,  # an overflow is the loss scaler's business
        )
        self.chunks = [DistributedDataParallel(self.config, ddp, half) for half in halves]
        parameters = [list(self._pieces(core.named_parameters(), core)) for core in self.cores]
        self.pieces = [[p for p in chunk if p.kind != "adapter"] for chunk in parameters]
        self.adapters = [[p for p in chunk if p.kind == "adapter"] for chunk in parameters]
        self.trained = self.adapters if lora else self.pieces
        self.frozen = self.pieces if lora else self.adapters
        self.buffers = [list(self._pieces(_weight_buffers(core), core)) for core in self.cores]

    def _build(self, chunk: int) -> GPTModel:
        spec = self.spec
        chunks = self.world.layout.model_chunks
        vp_stage = chunk if chunks > 1 else None
        stage = chunk * self.world.pipeline.size + self.world.pipeline.rank
        core = GPTModel(
            config=self.config,
            transformer_layer_spec=platform.current().layer_spec(self.config, vp_stage),
            vocab_size=spec.shapes.padded_vocabulary,
            max_sequence_length=spec.max_positions,
            pre_process=stage == 0,
            post_process=stage == chunks * self.world.pipeline.size - 1,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="rope",
            rotary_base=spec.rope_base,
            rotary_percent=spec.rope_fraction,
            rope_scaling=spec.rope_scaling_factor is not None,
            rope_scaling_factor=spec.rope_scaling_factor or 8.0,
            vp_stage=vp_stage,
        )
        return core.to(self.world.device)

    def _attach_adapters(self) -> dict[torch.nn.Parameter, Adapter]:
        """The adapters of this rank by the weight they belong to."""
        attached: dict[torch.nn.Parameter, Adapter] = {}
        if self.lora is None:
            return attached
        for core in self.cores:
            rules = [
                (name, self.spec.family.find(self.numbered(core, name)))
                for name, _ in core.named_parameters()
            ]
            attached.update(attach(core, rules, self.spec, self.lora, self.world))
        return attached

    def _transformer_config(self, options: dict[str, object]) -> TransformerConfig:
        layout = self.world.layout
        kind = MLATransformerConfig if self.spec.latent_attention else TransformerConfig
        return kind(
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
                "tensor_model_parallel_size": layout.tensor_parallel,
                "sequence_parallel": layout.sequence_parallel,
                "pipeline_model_parallel_size": layout.pipeline_parallel,
                "virtual_pipeline_model_parallel_size": layout.model_chunks
                if layout.model_chunks > 1
                else None,
                "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
                "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
                "expert_model_parallel_size": layout.expert_parallel,
                "expert_tensor_parallel_size": layout.expert_tensor_parallel,
                # The interleaved schedule is given equal shapes: between two ranks each is the
                # other's next and previous, and Megatron exchanges shapes in an order that mixes
                # them up. The tensors go one by one for the same reason.
                "variable_seq_lengths": layout.pipeline_parallel > 1 and layout.model_chunks == 1,
                "batch_p2p_comm": layout.model_chunks == 1,
                # Megatron asks for this dispatcher wherever lengths vary, of dense models too.
                "moe_token_dispatcher_type": "alltoall",
                "finalize_model_grads_func": finalize_model_grads,
                **platform.current().transformer_options(),
                # Megatron's fused rope of latent attention is for YaRN alone, and experimental.
                **({"apply_rope_fusion": False} if self.spec.latent_attention else {}),
                **options,
            }
        )

    def _mark_whole(self, core: GPTModel) -> None:
        """Has each weight that is whole on every tensor-parallel rank count once in the gradient norm.

        Transformer Engine 2.11 marks the weights of all its linear layers as cut (module/linear.py), those
        too that Megatron repeats: latent attention's down projections. megatron-core 0.16.1 goes by the
        mark (param_is_not_tensor_parallel_duplicate).
        """
        for piece in self._pieces(core.named_parameters(), core):
            if isinstance(self.spec.family.find(self.whole_name(piece)).layout, Replicated):
                piece.parameter.tensor_model_parallel = False

    def _pieces(
        self, tensors: Iterable[tuple[str, torch.Tensor]], core: GPTModel
    ) -> Iterator[Piece]:
        """Parameters or buffers of one of the cores."""
        for name, tensor in tensors:
            yield Piece(self.numbered(core, name), tensor)

    def numbered(self, core: GPTModel, name: str) -> str:
        """A name in `core` with layers counted over all stages, and experts over all ranks."""
        layer = re.match(r"decoder\.layers\.(\d+)", name)
        if layer:
            number = core.decoder.layers[int(layer[1])].layer_number - 1
            name = f"decoder.layers.{number}{name[layer.end() :]}"
        return self._with_expert_of(self.world.expert.rank, name)

    def _with_expert_of(self, rank: int, name: str) -> str:
        """The name with an expert's number, here or in the whole model, as `rank` has its like."""

        def whole(match: re.Match) -> str:
            here = self.config.num_moe_experts // self.world.expert.size
            return f"{match[1]}{int(match[2]) % here + here * rank}"

        return _EXPERT_NUMBER.sub(whole, name)

    def whole(self, pieces: list[list[Piece]]) -> list[list[WholeTensors]]:
        """[chunk][piece]: what is exported of this rank's pieces, and of their like on its expert ranks."""
        return [[self._whole(piece) for piece in chunk] for chunk in pieces]

    @functools.cached_property
    def _stages(self) -> list[list[list[WholeTensors]]]:
        return self._inventory(self.pieces)

    @functools.cached_property
    def _buffer_stages(self) -> list[list[list[WholeTensors]]]:
        return self._inventory(self.buffers)

    @functools.cached_property
    def _trained_stages(self) -> list[list[list[WholeTensors]]]:
        return self._inventory(self.trained)

    def _inventory(self, pieces: list[list[Piece]]) -> list[list[list[WholeTensors]]]:
        """[stage][chunk][piece]: what the pieces of this rank's pipeline are in Hugging Face's words.

        Collective over the pipeline.
        """
        mine = self.whole(pieces)
        stages: list[list[list[WholeTensors]] | None] = [None] * self.world.pipeline.size
        dist.all_gather_object(stages, mine, group=self.world.pipeline.group)
        return stages

    def _whole(self, piece: Piece) -> WholeTensors:
        """Names and shapes of the Hugging Face tensors that `_gather` makes of a piece."""
        if self.is_tied_copy(piece):
            return []
        rule = self.spec.family.find(piece.name)
        shard = torch.empty(piece.parameter.shape, device="meta")
        whole = rule.layout.join([shard] * self._tensor_axis(piece).size, self.spec.shapes)
        ranks = range(self.world.expert.size if piece.is_expert else 1)
        families = [self.spec.family.find(self._with_expert_of(r, piece.name)).hf for r in ranks]
        return [
            (name, tensor.shape)
            for names in families
            for name, tensor in zip(names, whole, strict=True)
        ]

    def replicas_of(self, piece: Piece) -> Axis:
        """The data-parallel ranks that hold the same shard."""
        return self.world.expert_data if piece.is_expert else self.world.data

    def is_tied_copy(self, piece: Piece) -> bool:
        """Whether this is the last stage's copy of an embedding that the first stage holds."""
        return self.spec.tied and piece.name == "output_layer.weight"

    def whole_name(self, piece: Piece) -> str:
        """The piece's name; that of the embedding for its copy on the last stage."""
        return "embedding.word_embeddings.weight" if self.is_tied_copy(piece) else piece.name

    def _tensor_axis(self, piece: Piece) -> Axis:
        return self.world.expert_tensor if piece.is_expert else self.world.tensor

    @torch.no_grad()
    def load(self, folder: HFFolder) -> None:
        """Fills this rank's shards from a Hugging Face folder; adapters start anew.

        Collective over the world.
        Raises WeightsError for tensors that are missing, left over, of another shape, not finite, or
        beyond what the model's dtype can hold.
        """
        if self.spec.tied:
            folder.check_tied()
        used: set[str] = set()
        for piece in itertools.chain(*self.pieces, *self.buffers):
            rule = self.spec.family.find(self.whole_name(piece))
            shapes = dict(self._whole(piece))  # none of a tied copy
            tensors = []
            for hf_name in rule.hf:
                tensor = folder.read(hf_name)
                _check_shape(folder.where(hf_name), tensor, shapes.get(hf_name, tensor.shape))
                _check_range(folder.where(hf_name), tensor, piece.parameter.dtype)
                tensors.append(tensor)
            used.update(rule.hf)
            axis = self._tensor_axis(piece)
            shard = rule.layout.split(tensors, axis.size, self.spec.shapes)[axis.rank]
            piece.parameter.copy_(shard)
        everywhere: list[set[str] | None] = [None] * self.world.size
        dist.all_gather_object(everywhere, used)
        used = set().union(*everywhere)
        about = (self.config.num_layers, self.spec.mtp_layers, self.spec.tied)
        left = [n for n in folder.names() if n not in used and not is_spare(n, *about)]
        if left:
            raise WeightsError(
                f"{folder.path}: no parameter of the model takes {', '.join(left[:5])}"
            )
        self.set_adapters(lambda name, shape: initial(name, shape, self.lora.seed))

    @torch.no_grad()
    def set_adapters(self, value: Callable[[str, torch.Size], torch.Tensor]) -> None:
        """Fills the adapters with what `value` has for a Hugging Face name and a whole shape."""
        for piece in itertools.chain(*self.adapters):
            ((name, shape),) = self._whole(piece)
            layout, axis = self.spec.family.find(piece.name).layout, self.world.tensor
            shards = layout.split([value(name, shape)], axis.size, self.spec.shapes)
            piece.parameter.copy_(shards[axis.rank])

    def export(self, served: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (Hugging Face name, weight) in a fixed order, in the model's dtype, on rank 0.

        Buffers stay fp32, and come first: in a bucket of bytes every tensor is then aligned.
        Collective over the world, as `gather` is. Raises WeightRangeError, on all ranks and before
        the first tensor, if a weight is not finite or beyond what `served` can hold, to which the
        weights are to be cast (by default the model's dtype).

        Adapters are merged into the weights: who gets these need not know of them.
        """
        self._check_all(served or self.dtype)
        yield from self._collect(
            self.buffers, self._buffer_stages, torch.Tensor.detach, torch.float32
        )
        yield from self._collect(self.pieces, self._stages, self._merged, self.dtype)

    def _merged(self, parameter: torch.Tensor) -> torch.Tensor:
        adapter = self._adapter_of.get(parameter)
        return parameter.detach() if adapter is None else adapter.merged(parameter)

    def gather(
        self, value: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (Hugging Face name, tensor) on rank 0, of a value that each trained parameter has.

        Collective over the world: every rank must run through it; the others yield nothing. One
        parameter, of one expert, is gathered at a time: it is all that a rank holds beside its shards.
        """
        yield from self._collect(self.trained, self._trained_stages, value, dtype)

    @torch.no_grad()
    def _collect(
        self,
        pieces: list[list[Piece]],
        stages: list[list[list[WholeTensors]]],
        value: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for chunk, mine in enumerate(pieces):
            for stage, inventory in enumerate(stages):
                for i, whole in enumerate(inventory[chunk]):
                    tensors: Iterator[torch.Tensor] = iter(())
                    if whole and stage == self.world.pipeline.rank:
                        tensors = self._gather(mine[i], value(mine[i].parameter))
                    yield from self._to_first(stage, whole, tensors, dtype)

    def _to_first(
        self, stage: int, whole: WholeTensors, tensors: Iterator[torch.Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Sends tensors from the leader of a stage to rank 0, which yields them."""
        if not self.world.is_rank0:
            for tensor in tensors:
                dist.send(tensor.contiguous(), 0)
            return
        for name, shape in whole:
            if stage == 0:
                yield name, next(tensors)
            else:
                tensor = torch.empty(shape, dtype=dtype, device=self.world.device)
                dist.recv(tensor, self.world.leader_of(stage))
                yield name, tensor
        for _ in tensors:
            raise AssertionError("more tensors than _whole has names")

    def _gather(self, piece: Piece, shard: torch.Tensor) -> Iterator[torch.Tensor]:
        """The tensors that `_whole` names, on the stage's leader; nothing elsewhere."""
        if self.replicas_of(piece).rank:
            return
        shards = _gather_to_first(shard, self._tensor_axis(piece))
        if not shards:
            return
        tensors = self.spec.family.find(piece.name).layout.join(shards, self.spec.shapes)
        del shards
        if not piece.is_expert:
            yield from tensors
            return
        expert = self.world.expert
        for rank in range(expert.size):  # one expert after the other
            for tensor in tensors:
                if rank == expert.rank == 0:
                    yield tensor
                elif expert.rank == 0:
                    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                    dist.recv(received, group=expert.group, group_src=rank)
                    yield received
                elif expert.rank == rank:
                    dist.send(tensor.contiguous(), group=expert.group, group_dst=0)

    def _check_all(self, served: torch.dtype) -> None:
        limits = {True: torch.finfo(served).max, False: torch.finfo(torch.float32).max}
        bad = [
            f"{piece.name} reaches {largest:g}"
            for pieces, is_cast in ((self.pieces, True), (self.buffers, False))
            for piece in itertools.chain(*pieces)
            if not (largest := _largest(self._merged(piece.parameter))) <= limits[is_cast]  # or nan
        ]
        count = torch.tensor([float(len(bad))], device=self.world.device)
        dist.all_reduce(count)
        if count.item():
            here = f"; on rank {self.world.rank}: {', '.join(bad[:5])}" if bad else ""
            raise WeightRangeError(
                f"{int(count.item())} parameter shard(s) hold values beyond {served} (largest number "
                f"{limits[True]:g}){here}. Nothing was published; the servers keep the last good version"
            )


def _keep_router_buffers_in_fp32(core: GPTModel) -> None:
    """Undoes Float16Module's cast, before weights are loaded.

    megatron-core 0.16.1 restores the expert bias only at the first forward pass, when its bits are
    lost, and never the count of tokens, which fp16 keeps exactly up to 2,048 only.
    """
    for module in core.modules():
        if isinstance(module, Router):
            for buffer in module.buffers():
                buffer.data = buffer.data.float()


def _mark_experts(core: GPTModel) -> None:
    """Has the gradients of experts summed over the ranks that hold the same ones.

    megatron-core 0.16.1 takes experts for dense parameters where expert_parallel is 1, even if they
    are repeated over tensor-parallel ranks, which have different tokens: the replicas drift apart.
    """
    for name, parameter in core.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def _accumulate_in_fp32(core: GPTModel) -> None:
    """Has Transformer Engine's layers add a micro-batch's weight gradients to the fp32 ones unrounded.

    Megatron's option for it wants apex, for the sake of its own layers (tensor_parallel/layers.py of
    megatron-core 0.16.1). Of those the output layer is left, whose gradients pass through the model's
    dtype as without Transformer Engine, and with it the embedding it is tied to.
    """
    for module in core.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _weight_buffers(core: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, b) for name, b in core.named_buffers() if name.endswith("router.expert_bias"))


def _gather_to_first(tensor: torch.Tensor, axis: Axis) -> list[torch.Tensor]:
    """The tensors of all ranks of an axis, on its first; nothing elsewhere."""
    if axis.size == 1:
        return [tensor]
    tensor = tensor.contiguous()
    gathered = None if axis.rank else [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.gather(tensor, gathered, group=axis.group, group_dst=0)
    return gathered or []


def _largest(tensor: torch.Tensor) -> float:
    """The largest magnitude; nan if there is one."""
    return tensor.detach().abs().max().float().item() if tensor.numel() else 0.0


def _check_shape(where: str, tensor: torch.Tensor, wanted: torch.Size) -> None:
    if tensor.shape != wanted:
        raise WeightsError(
            f"{where} is {list(tensor.shape)}, but its config.json asks for {list(wanted)}: one of the two "
            "is of another model"
        )


def _check_range(where: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    highest = _largest(tensor)
    if not math.isfinite(highest):
        raise WeightsError(
            f"{where} holds {'NaN' if math.isnan(highest) else 'an infinity'}: the file is damaged, or what "
            "trained it diverged. Fetch or save the model again"
        )
    if highest > limit:
        raise WeightsError(
            f"{where} reaches {highest:g}, which {dtype} (largest number {limit:g}) cannot hold: take "
            "bf16 (precision: bf16 in a recipe, --dtype bf16 to convert)"
        )
