"""Models that name a family by an alias: read as that family, exported under their own name."""

import json
import subprocess
import sys

import pytest

from megatron_fp16rl.models.check import check_folder, check_served_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder, write_folder
from megatron_fp16rl.models.tokenizer import load_tokenizer
from megatron_fp16rl.recipe import RecipeError
from tests import models


@pytest.fixture
def kimi(tmp_path):
    """As Moonshot names its models: DeepSeek-V3's class, an alias, and code that is never run."""
    folder = models.whole_folder(tmp_path / "kimi", **models.KIMI_K2, tie_word_embeddings=False)
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    models.edit_json(folder / "config.json", model_type="kimi_k2", auto_map=code)
    return folder


def test_kimi_k2_is_read_as_deepseek_v3_and_exported_under_its_own_name(kimi, tmp_path):
    check_served_folder(kimi)
    assert load_config(kimi).model_type == "deepseek_v3"
    assert load_tokenizer(kimi).encode("1+1=")
    source = HFFolder(kimi)
    tensors = ((name, source.read(name).half()) for name in source.names())
    write_folder(tmp_path / "export", kimi, "float16", tensors)
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    assert exported["model_type"] == "kimi_k2"
    check_folder(tmp_path / "export")


def test_a_server_reads_kimi_k2_without_code_of_the_folder(kimi):
    """In a process of its own: transformers is changed for good."""
    code = (
        "import sys; from transformers import AutoConfig\n"
        "from megatron_fp16rl.models.config import register_aliases\n"
        "register_aliases(); register_aliases()\n"
        "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "print(config.model_type, config.architectures, config.kv_lora_rank, config.topk_method)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(kimi)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "kimi_k2 ['DeepseekV3ForCausalLM'] 32 noaux_tc", done.stderr


@pytest.mark.parametrize("architectures", [["KimiK2ForCausalLM"], ..., []])
def test_an_alias_of_another_class_is_refused(kimi, architectures):
    models.edit_json(kimi / "config.json", architectures=architectures)
    with pytest.raises(
        RecipeError, match=r'"kimi_k2" is not supported; .*kimi_k2 of DeepseekV3For'
    ):
        load_config(kimi)
