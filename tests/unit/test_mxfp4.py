"""gpt-oss's MXFP4 weights: read as transformers reads them, and written as halves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from megatron_fp16rl.models.check import check_folder
from megatron_fp16rl.models.config import load_config
from megatron_fp16rl.models.folder import HFFolder
from megatron_fp16rl.models.source import WeightsError
from megatron_fp16rl.models.spec import check_served
from megatron_fp16rl.recipe import RecipeError
from tests import models

GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))


@pytest.fixture
def published(tmp_path):
    """A folder as OpenAI's: experts in MXFP4, the rest bf16. Of all bytes, and exponents that fp16 holds."""
    folder = models.whole_folder(tmp_path / "published", **models.MOE_FAMILIES["gpt-oss"])
    models.in_mxfp4(folder, (115, 140))
    return folder


def reference(folder: Path, name: str) -> torch.Tensor:
    tensors = load_file(folder / "model.safetensors")
    return convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])


@pytest.mark.parametrize("name", [GATE_UP, DOWN])
def test_mxfp4_is_read_as_transformers_reads_it_whole_and_in_parts(published, name):
    expected, weights = reference(published, name), HFFolder(published)
    assert expected.unique().numel() > 100
    assert torch.equal(weights.read(name), expected)
    assert weights.entry(name).shape == expected.shape
    assert torch.equal(weights.read_box(name, (3, 0, 10), (4, 64, 20)), expected[3:4, :64, 10:20])
    assert torch.equal(weights.read_box(name, (0, 5, 0), (8, 6, 64)), expected[:, 5:6, :64])


def test_a_learner_takes_the_folder_and_servers_take_its_conversion(published, tmp_path):
    check_folder(published)
    with pytest.raises(RecipeError, match=r"keep MXFP4 weights.*fp16rl convert mxfp4"):
        check_served(load_config(published))
    half = tmp_path / "half"
    arguments = ["convert", "mxfp4", str(published), str(half), "--dtype", "float16"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    check_folder(half)
    check_served(load_config(half), "float16")
    with pytest.raises(RecipeError, match="dtype=float16, but servers run in bfloat16"):
        check_served(load_config(half), "bfloat16")
    assert "quantization_config" not in json.loads((half / "config.json").read_text())
    assert torch.equal(HFFolder(half).read(DOWN), reference(published, DOWN).half())


def test_what_is_no_mxfp4_or_does_not_fit_is_refused(published, tmp_path):
    def spoil(tensors):
        tensors[f"{DOWN}_scales"][0, 0, 0] = 200

    models.edit_tensors(published, spoil)
    arguments = ["convert", "mxfp4", str(published), str(tmp_path / "half"), "--dtype", "float16"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code
    assert f"{DOWN} holds numbers that torch.float16 cannot" in " ".join(done.output.split())
    assert not (tmp_path / "half").exists()
    models.edit_tensors(published, lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][1:]}))
    with pytest.raises(WeightsError, match=r"down_proj_blocks is U8.*that is not MXFP4"):
        HFFolder(published)
