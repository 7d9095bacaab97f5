"""The learner: its ranks, its optimizer, its precision."""

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_fp16rl.recipe.section import AsMeant, Dtype, Section, multiples


class Optimizer(Section):
    lr: PositiveFloat = 1e-6
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = Field(1e-8, description="of Adam; the FP16 paper's authors set 1e-15")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: PositiveFloat = 1.0


class Layout(Section):
    """How the learner's ranks share the model and the batch; the words are Megatron's."""

    ranks: PositiveInt = Field(1, description="learner processes in all")
    tensor_parallel: PositiveInt = 1
    sequence_parallel: bool = Field(
        False,
        description="norms and dropout cut along the sequence, over the tensor-parallel ranks",
    )
    pipeline_parallel: PositiveInt = 1
    model_chunks: PositiveInt = Field(
        1, description="stages of each pipeline rank; more than 1 is the interleaved schedule"
    )
    first_stage_layers: PositiveInt | None = Field(
        None,
        description="of the first pipeline rank, where the others share the rest of the layers",
    )
    last_stage_layers: PositiveInt | None = Field(
        None, description="the same of the last pipeline rank"
    )
    context_parallel: PositiveInt = 1
    expert_parallel: PositiveInt = 1
    expert_tensor_parallel: PositiveInt = Field(
        1, description="ranks that share one expert; expert_parallel x this divides the ranks"
    )

    @property
    def data_parallel(self) -> int:
        return self.ranks // (self.tensor_parallel * self.pipeline_parallel)

    @property
    def uneven_stages(self) -> dict[str, int]:
        """Layers of the first and the last pipeline rank, by the names of their keys, where given."""
        given = {name: getattr(self, name) for name in ("first_stage_layers", "last_stage_layers")}
        return {name: layers for name, layers in given.items() if layers is not None}

    @model_validator(mode="after")
    def _divides(self) -> "Layout":
        for names in (
            ("tensor_parallel", "pipeline_parallel"),
            ("expert_tensor_parallel", "expert_parallel", "pipeline_parallel"),
        ):
            product = math.prod(getattr(self, name) for name in names)
            if self.ranks % product:
                said = " x ".join(f"{n}={getattr(self, n)}" for n in names if getattr(self, n) > 1)
                raise ValueError(
                    f"ranks={self.ranks} is not a multiple of {said}"
                    f"; nearest: {multiples(self.ranks, product)}"
                )
        if self.context_parallel > 1:
            raise ValueError(
                "context_parallel > 1 is not supported: Megatron-core's own attention refuses it (only "
                "Transformer Engine's has it); use tensor_parallel with sequence_parallel: true"
            )
        if self.model_chunks > 1 and self.pipeline_parallel == 1:
            raise ValueError("model_chunks > 1 needs pipeline_parallel > 1")
        for name, layers in self.uneven_stages.items():
            if self.pipeline_parallel == 1:
                raise ValueError(f"{name}={layers} needs pipeline_parallel > 1")
            if layers % self.model_chunks:
                raise ValueError(
                    f"{name}={layers} is not a multiple of model_chunks={self.model_chunks}; nearest: "
                    f"{multiples(layers, self.model_chunks)}"
                )
        if self.model_chunks > 1 and len(self.uneven_stages) == self.pipeline_parallel:
            raise ValueError(  # Megatron-core 0.16.1 would divide by the ranks between, which are none
                "model_chunks > 1 and pipeline_parallel=2: one rank has what the other leaves; set "
                "last_stage_layers to null"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel needs tensor_parallel > 1")
        return self


class Lora(Section):
    """Low-rank adapters, trained in place of the weights: W + alpha / rank * B A."""

    rank: PositiveInt
    alpha: PositiveFloat
    targets: list[
        Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="linear layers that have adapters, in Hugging Face's words",
    )
    seed: int = Field(0, description="of the matrices A; B begins at zero")


class Learner(Layout):
    distributed_optimizer: bool = False
    global_batch_size: PositiveInt = Field(description="sequences per optimizer update")
    micro_batch_tokens: PositiveInt = Field(8192, description="padded tokens a rank runs at once")
    pad_to_multiple_of: PositiveInt | None = Field(
        None,
        description="tokens of a padded sequence: attention is planned anew for each length, so there "
        "are to be few; None: 256 on CUDA, 1 on CPUs",
    )
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = Field(None, description="None: all weights are trained")
    megatron: Annotated[dict[str, object], AsMeant] = Field(
        default_factory=dict, description="passed on to Megatron's TransformerConfig"
    )

    @model_validator(mode="after")
    def _keeps_one_dtype_between_layers(self) -> "Learner":
        # megatron-core 0.16.1 makes only the embedding fp32: the first linear then multiplies fp32 by fp16.
        if self.megatron.get("fp32_residual_connection"):
            raise ValueError(
                "megatron.fp32_residual_connection is not supported: with it Megatron-core's layers get fp32 "
                "where their weights are fp16, and stop at the first product; remove it"
            )
        return self

    def length_multiple(self, default: int) -> int:
        """Tokens of which a padded sequence is a multiple. default: of the platform, for None."""
        parts = self.tensor_parallel if self.sequence_parallel else 1  # that it is cut into
        return math.lcm(self.pad_to_multiple_of or default, parts)


class LossScale(Section):
    initial: PositiveFloat = 2.0**15
    minimum: PositiveFloat = 1.0
    window: PositiveInt = Field(400, description="good updates before the scale doubles")
    hysteresis: PositiveInt = Field(1, description="overflows before the scale halves")
    max_skips: PositiveInt = Field(8, description="skipped updates in a row that stop the run")

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
    rollout: Dtype | None = Field(None, description="only to mix on purpose; None means dtype")
    loss_scale: LossScale = LossScale()

    @property
    def served(self) -> Dtype:
        return self.rollout or self.dtype
