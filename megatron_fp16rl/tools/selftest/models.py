"""Tiny random models and sequences, and a learner of one rank for them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_fp16rl.models.build import build
from megatron_fp16rl.models.families import FAMILIES
from megatron_fp16rl.parallel import World, initialize, single_process_environment
from megatron_fp16rl.recipe import BuildModel, Dtype, Layout, LossScale, Precision
from megatron_fp16rl.recipe.learner import Learner as LearnerSettings
from megatron_fp16rl.utils.processes import free_port

if TYPE_CHECKING:  # importing these imports Megatron, which the platform has to prepare first
    from megatron_fp16rl.learner.learner import Learner

# Tiny configurations of every family, by the names that its file gives them; and two that stand for all.
EVERY = {
    name: {"model_type": family.model_type, **config}
    for family in FAMILIES.values()
    for name, config in family.tiny.items()
}
TINY = {name: EVERY[name] for name in ("qwen3", "qwen3-moe")}
# Gradients are not clipped, so that they can be compared.
LEARNER: dict[str, Any] = {
    "global_batch_size": 4,
    "micro_batch_tokens": 48,
    "optimizer": {"lr": 1e-3, "clip_grad": 1e9},
}


def world() -> World:
    """Makes this process a world of one rank."""
    single_process_environment(free_port("127.0.0.1"))
    return initialize(Layout(), seed=0)


def packing(tokens: int) -> LearnerSettings:
    """A learner's settings, with micro-batches of so many tokens."""
    return LearnerSettings.model_validate({**LEARNER, "micro_batch_tokens": tokens})


def learner(
    folder: Path,
    of: World,
    dtype: Dtype,
    temperature: float = 1.0,
    settings: LearnerSettings | None = None,
) -> "Learner":
    """A learner of a folder's model. settings: by default LEARNER's."""
    from megatron_fp16rl.learner.learner import Learner

    settings = settings or LearnerSettings.model_validate(LEARNER)
    precision = Precision(dtype=dtype, loss_scale=LossScale())
    return Learner(folder, of, settings, precision, temperature=temperature)


def built(folder: Path) -> None:
    """A random model that servers take, with its tokenizer: heads as wide as GPUs have them, lively weights."""
    size = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "initializer_range": 0.1}
    build(BuildModel(config={**TINY["qwen3"], **size}, alphabet="0123456789+="), folder)


def hf_model(config: dict[str, Any], folder: Path, vocabulary: int = 99) -> Any:
    """Writes a random fp32 model with lively norms and biases; returns it, as it is served, in evaluation mode.

    99 tokens: odd on purpose, so that tensor parallelism has to pad the vocabulary.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(config)
    made = AutoConfig.for_model(options.pop("model_type"), vocab_size=vocabulary, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "sinks")):
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
                parameter.mul_(20)  # a router whose choices are no toss-up
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    FAMILIES[made.model_type].as_served(model)
    return model


def random_tokens(
    vocabulary: int = 99, lengths: tuple[int, ...] = (9, 24, 17, 24)
) -> list[list[int]]:
    """Sequences of unequal length, without token 0.

    Token 0 pads: transformers makes its embedding zero, and the norm of a zero vector has a
    gradient 1,000 times larger than any other.
    """
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]
