"""Prints docs/models.md, from the families' files and from what the tests run.

python -m tests.families > docs/models.md
"""

import importlib
from collections import Counter

from transformers import AutoConfig

from megatron_fp16rl.models import families
from megatron_fp16rl.models.build import model_config
from megatron_fp16rl.recipe import load
from megatron_fp16rl.tools import recipes
from tests import models

HEAD = """\
# Models

<!-- Written by python -m tests.families: run it again. -->

`model.path` takes a model of these families. The learner computes what transformers does at every layout that
[parity](parity.md) lists for dense models or experts: packed, in rows, context-parallel. Weights reach servers by any
`sync.transport`. *Served*: tests compare a server's log-probs, and each of its parameters after a sync.

| `model_type` | models | layers | LoRA on | router replay | served | large recipes |
|---|---|---|---|---|---|---|
"""
TAIL = """
None of this was seen on a GPU. What is known of a family's [range in FP16](range.md#published).

**Kimi-K2** is read as DeepSeek-V3 where its `config.json` names that class, and exported under its own name. First convert its
fp8 weights, and its tokenizer, which is code and never run, to a `tokenizer.json`.

**GLM-4.7-Flash.** transformers 5.19 fixes the eps of latents' norms at 1e-6; the learner takes the model's 1e-5, as SGLang
does.

**gpt-oss.** Learners dequantise MXFP4; servers would keep it, so convert first: `fp16rl convert mxfp4 gpt-oss-20b OUT`, in the
servers' dtype: SGLang 0.5.23 takes `config.json`'s, and rounds sinks to bf16 in any. Experts have biases: no `expert_tensor_parallel`. Of GPUs only read:
Transformer Engine has one kernel for sinks, cuDNN's: packed from 9.18, else `learner.packing: false`; with
`context_parallel`, `learner.megatron: {cp_comm_type: a2a}`.

**Qwen3-Next.** Its gated delta nets are Megatron's, with the kernels of flash-linear-attention on a GPU (`pip install
flash-linear-attention[cuda]`), plain torch on a CPU. Qwen3.5 is refused: its tensors are published inside a vision model's.

Not here? [Add a family](add-a-family.md).
"""


def page() -> str:
    """The whole page: a row for each family."""
    paths = [p for p in recipes.paths() if p.parent.name in ("dense", "moe")]
    shipped = Counter(model_config(load(path).model).model_type for path in paths)
    served = {"llama", "qwen3"}  # SmolLM2 and the tiny recipe
    served |= {config["model_type"] for config, _ in models.SERVED.values()}
    rows = [row(family, shipped, served) for family in families.FAMILIES.values()]
    return HEAD + "\n".join(rows) + "\n" + TAIL


def row(family: families.Family, shipped: Counter, served: set[str]) -> str:
    tiny = next(iter(family.tiny.values()))
    options = family.options(AutoConfig.for_model(family.model_type, **tiny))
    experts, latent = "num_moe_experts" in options, "multi_latent_attention" in options
    about = importlib.import_module(f"{families.__name__}.{family.model_type}").__doc__
    cells = [
        ", ".join(f"`{name}`" for name in (family.model_type, *family.aliases)),
        about.partition(":")[0].removesuffix("."),
        "experts" if experts else "dense",
        "nothing"
        if latent or "linear_attention_freq" in options
        else "attention"
        if experts
        else "all",
        "yes" if experts else "-",
        "yes" if family.model_type in served else "no",
        str(shipped[family.model_type]),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page(), end="")
