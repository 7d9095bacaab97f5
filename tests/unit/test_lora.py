"""Settings of LoRA."""

import pytest
from pydantic import ValidationError

from megatron_fp16rl.recipe import Lora


def test_targets_are_checked():
    with pytest.raises(ValidationError, match="'q_proj', 'k_proj'"):
        Lora(rank=1, alpha=2, targets=["query"])
    with pytest.raises(ValidationError, match="at least 1 item"):
        Lora(rank=1, alpha=2, targets=[])
