"""What a family file states: the mapping of its tensors, its configuration, and its limits."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_fp16rl.models.layouts import Cut, ParameterLayout, Replicated, Stacked

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Options = Callable[["PretrainedConfig"], dict[str, Any]]
Test = Callable[["PretrainedConfig"], bool]
Config = dict[str, Any]  # values of a config.json

# Transformer Engine puts a norm into the linear layer that follows it, and all experts into one module.
_LOCAL_NORMS = {
    "self_attention.linear_qkv": "input_layernorm.weight",
    "self_attention.in_proj": "input_layernorm.weight",
    "self_attention.linear_q_up_proj": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1": "pre_mlp_layernorm.weight",
}
_TE_NORMS = re.compile(rf"({'|'.join(map(re.escape, _LOCAL_NORMS))})\.layer_norm_weight")
_TE_EXPERTS = re.compile(r"experts\.(linear_fc[12])\.(weight|bias)(\d+)")
_ADAPTER = re.compile(r"(.+)_lora\.(\w+)_([AB])")


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors that make it; {} is the layer, or the expert.

    expert: its number in a tensor of all experts (Stacked); else None.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: ParameterLayout
    expert: int | None = None


@dataclass(frozen=True)
class Family:
    """All that is known of a model family. To add one, add a file like `qwen3.py`.

    model_type       as config.json names it
    aliases          other names of it, of models with the same keys, tensors and class
    rules            the tensor table; a model may leave rules unused
    tiny             config.json values of small models for tests, by name: at least one, and one for
                     each way in which models of the family differ
    sglang           module and class of SGLang's implementation
    options          config -> values of TransformerConfig that are not the same in every family; and yarn_*,
                     which Megatron reads beside them
    unsupported      (what, test of the config): models that Megatron would compute otherwise
    check_served     raises RecipeError for a model that SGLang 0.5.23 would silently serve wrongly
    served_as_saved  whether SGLang makes weights in config.json's dtype, whatever the server's
    as_served        changes a transformers model that computes otherwise than SGLang and its authors; for
                     tests: the learner computes what is served
    served_as        config -> keys of a config.json as SGLang reads them, which may have others by now
    fused_by_sglang  name endings of tensors that SGLang makes one of, in order: they are sent together
    quantised        quant_method of weights that are dequantised on loading (models/mxfp4.py)
    partial_rotary   whether rope reads partial_rotary_factor
    fp16_range       the highest initial loss scale without a known overflow in fp16, and what is published,
                     with its source: seen with other systems, not here (docs/range.md)
    """

    model_type: str
    rules: tuple[Rule, ...]
    tiny: Mapping[str, Config]
    sglang: tuple[str, str]
    aliases: tuple[str, ...] = ()
    options: Options = lambda config: {}
    unsupported: tuple[tuple[str, Test], ...] = ()
    check_served: Callable[["PretrainedConfig"], None] = lambda config: None
    served_as_saved: bool = False
    as_served: Callable[["PreTrainedModel"], None] = lambda model: None
    served_as: Options | None = None
    fused_by_sglang: tuple[str, ...] = ()
    quantised: str | None = None
    partial_rotary: bool = False
    fp16_range: tuple[float, str] | None = None

    def find(self, megatron_name: str) -> Rule:
        """The rule of a parameter, with its layer (and expert) filled in.

        The name counts layers over all stages and experts over all ranks. Names of Transformer
        Engine's layers are read as those of the local layers. Adapters follow from the weight that they
        belong to. Raises KeyError for a parameter outside the table.
        """
        adapter = _ADAPTER.fullmatch(megatron_name)
        if adapter:
            return self._find_adapter(megatron_name, *adapter.groups())
        name = _TE_NORMS.sub(lambda m: _LOCAL_NORMS[m[1]], megatron_name)
        name = _TE_EXPERTS.sub(r"experts.local_experts.\3.\1.\2", name)
        numbers = re.findall(r"\.(\d+)\.", name)
        template = re.sub(r"\.\d+\.", ".{}.", name)
        for rule in self.rules:
            if rule.megatron == template:
                expert = int(numbers[-1]) if isinstance(rule.layout, Stacked) else None
                hf = tuple(hf.format(*numbers) for hf in rule.hf)
                return Rule(name, hf, rule.layout, expert)
        raise KeyError(f"no rule maps Megatron's parameter {megatron_name}")

    def _find_adapter(self, name: str, linear: str, module: str, matrix: str) -> Rule:
        """The rule of the A or B of a Hugging Face module inside one of Megatron's linear layers."""
        rule = self.find(f"{linear}.weight")
        (weight,) = (hf for hf in rule.hf if hf.endswith(f".{module}.weight"))
        layout: ParameterLayout
        if rule.layout == Cut(1):  # row-parallel: A is cut as the weight's columns, B is whole
            layout = Cut(1) if matrix == "A" else Replicated()
        else:
            layout = Replicated() if matrix == "A" else Cut(0)
        return Rule(name, (f"{weight.removesuffix('weight')}lora_{matrix}.weight",), layout)
