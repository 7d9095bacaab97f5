"""What a learner is built from: its layout, its optimizer, its precision. None needs a whole recipe."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from megatron_fp16rl.recipe import megatron_options
from megatron_fp16rl.recipe.values import (
    Dtype,
    Float,
    Head,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    Section,
    multiples,
)


class Optimizer(Section):
    """Adam, its schedule and clipping."""

    lr: PositiveFloat = 1e-6
    min_lr: NonNegativeFloat = 0.0
    warmup_updates: NonNegativeInt = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    beta1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8  # the FP16 paper's authors set 1e-15
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: PositiveFloat = 1.0
    megatron: Options = Field({})  # to Megatron's OptimizerConfig; not all are supported

    @model_validator(mode="after")
    def _decays(self) -> "Optimizer":
        if self.decay != "constant" and self.min_lr > self.lr:
            raise ValueError(
                f"decay={self.decay}: min_lr={self.min_lr:g} is above lr={self.lr:g}; lower the first"
            )
        return self

    @model_validator(mode="after")
    def _passes_on_what_is_proved(self) -> "Optimizer":
        megatron_options.check(self.megatron, megatron_options.OPTIMIZER, "megatron")
        return self


class Layout(Section):
    """How the learner's ranks share the model and the batch; the words are Megatron's."""

    ranks: PositiveInt = 1  # learner processes in all
    tensor_parallel: PositiveInt = 1
    sequence_parallel: bool = False  # norms, too, are split over those ranks
    pipeline_parallel: PositiveInt = 1
    model_chunks: PositiveInt = 1  # stages of a pipeline rank, interleaved
    first_stage_layers: PositiveInt | None = None  # of the first pipeline rank
    last_stage_layers: PositiveInt | None = None  # of the last pipeline rank
    context_parallel: PositiveInt = 1
    expert_parallel: PositiveInt = 1
    expert_tensor_parallel: PositiveInt = 1  # ranks that share one expert

    @property
    def data_parallel(self) -> int:
        model = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        return self.ranks // model

    @property
    def sequences_multiple(self) -> int:
        """Of what the sequences that a rank runs at once are a multiple.

        An interleaved pipeline takes a multiple of its ranks in micro-batches, and long sequences have one each.
        """
        return self.pipeline_parallel if self.model_chunks > 1 else 1

    @property
    def uneven_stages(self) -> dict[str, int]:
        """Layers of the first and the last pipeline rank by their keys, those that are set."""
        keys = "first_stage_layers", "last_stage_layers"
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}

    @model_validator(mode="after")
    def _divides_the_ranks(self) -> "Layout":
        for names in (
            ("tensor_parallel", "pipeline_parallel", "context_parallel"),
            ("expert_tensor_parallel", "expert_parallel", "pipeline_parallel"),
        ):
            sizes = {name: getattr(self, name) for name in names}
            product = math.prod(sizes.values())
            if self.ranks % product:
                factors = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
                raise ValueError(
                    f"ranks={self.ranks} is not a multiple of {factors}"
                    f"; nearest: {multiples(self.ranks, product)}"
                )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel needs tensor_parallel > 1")
        return self

    @model_validator(mode="after")
    def _stages_are_possible(self) -> "Layout":
        chunks = self.model_chunks
        if chunks > 1 and self.pipeline_parallel == 1:
            raise ValueError("model_chunks > 1 needs pipeline_parallel > 1")
        for name, layers in self.uneven_stages.items():
            if self.pipeline_parallel == 1:
                raise ValueError(f"{name}={layers} needs pipeline_parallel > 1")
            if layers % chunks:
                raise ValueError(
                    f"{name}={layers} is not a multiple of model_chunks={chunks}; nearest: "
                    f"{multiples(layers, chunks)}"
                )
        if chunks > 1 and len(self.uneven_stages) == self.pipeline_parallel:
            # Megatron-core 0.19.2 would divide by the number of ranks between the two, which is 0.
            raise ValueError(
                "model_chunks > 1 and pipeline_parallel=2: one rank has what the other leaves; set "
                "last_stage_layers to null"
            )
        return self


Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Lora(Section):
    """Low-rank adapters, trained in place of the weights: W + alpha / rank * B A."""

    rank: PositiveInt
    alpha: PositiveFloat
    targets: list[Target] = Field(list(get_args(Target)), min_length=1)  # linear layers
    seed: Int = 0  # of the matrices A; B begins at zero


class Learner(Layout):
    distributed_optimizer: bool = False
    global_batch_size: PositiveInt  # sequences per optimizer update
    micro_batch_tokens: PositiveInt = 8192  # tokens a rank runs at once, padding included
    packing: bool = True  # false: each sequence is padded to a row
    pad_to_multiple_of: PositiveInt | None = None  # of a row; null: 256 on CUDA, 1 on CPUs
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = None  # null: all weights are trained
    megatron: Options = Field({})  # passed on to Megatron's TransformerConfig
    ddp: Options = Field({})  # to its DistributedDataParallelConfig; not all are supported

    @model_validator(mode="after")
    def _fills_its_pipeline(self) -> "Learner":
        batch, unit = self.global_batch_size, self.data_parallel * self.sequences_multiple
        if self.sequences_multiple > 1 and batch % unit:
            raise ValueError(
                f"global_batch_size={batch} is not a multiple of {unit}, the data-parallel ranks x "
                "pipeline_parallel: with model_chunks > 1 each rank's micro-batches are a multiple of the latter, "
                f"and long sequences have one each; nearest: {multiples(batch, unit)}"
            )
        return self

    @model_validator(mode="after")
    def _says_each_thing_once(self) -> "Learner":
        for name in self.megatron:
            if remedy := megatron_options.SAID_ELSEWHERE.get(name):
                raise ValueError(f"megatron.{name}={self.megatron[name]!r}: {remedy}; remove it")
        return self

    @model_validator(mode="after")
    def _overlaps_what_there_is(self) -> "Learner":
        megatron_options.check(self.ddp, megatron_options.DDP, "ddp")
        if self.ddp.get("overlap_param_gather"):
            if not self.distributed_optimizer:
                raise ValueError(
                    "ddp.overlap_param_gather needs distributed_optimizer: true, which shares out the parameters"
                )
            if (
                self.lora is not None
            ):  # a hook of the linear layer adds them: Megatron's hooks miss that
                raise ValueError(
                    "ddp.overlap_param_gather does not gather lora's adapters, which are small: remove it"
                )
        if self.ddp.get("align_param_gather") and self.model_chunks == 1:
            raise ValueError("ddp.align_param_gather needs model_chunks > 1, or remove it")
        return self

    def padding(self, default: int) -> "Padding":
        """What tokens are padded to. default: the platform's multiple, where the recipe names none."""
        ranks = self.context_parallel
        chunks = 2 * ranks if ranks > 1 else 1  # see local_attention.zigzag
        parts = self.tensor_parallel if self.sequence_parallel else 1
        row = math.lcm(self.pad_to_multiple_of or default, chunks, ranks * parts)
        return Padding(sequence=chunks, row=row)


@dataclass(frozen=True)
class Padding:
    """What tokens are padded to: a multiple of `sequence` each packed sequence, of `row` each row."""

    sequence: int = 1
    row: int = 1


class LossScale(Section):
    initial: PositiveFloat = 2.0**15
    minimum: PositiveFloat = 1.0
    window: PositiveInt = 400  # good updates before the scale doubles
    hysteresis: PositiveInt = 1  # overflows before the scale halves
    max_skips: PositiveInt = 8  # skipped updates in a row: stops the run

    @model_validator(mode="after")
    def _begins_in_range(self) -> "LossScale":
        if self.initial < self.minimum:
            raise ValueError(
                f"initial={self.initial:g} is below minimum={self.minimum:g}: "
                "raise initial, or lower minimum"
            )
        return self


class Precision(Section):
    dtype: Dtype = "fp16"
    rollout: Dtype | None = None  # of the servers, to mix on purpose; null: dtype
    head: Head = None  # fp32: neither engine rounds logits to dtype
    loss_scale: LossScale = LossScale()

    @property
    def served(self) -> Dtype:
        return self.rollout or self.dtype
