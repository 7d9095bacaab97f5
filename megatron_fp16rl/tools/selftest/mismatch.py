"""Row mismatch: how far SGLang and the learner are apart on the same weights, in fp16 and in bf16."""

from megatron_fp16rl.platform import installed
from megatron_fp16rl.tools.selftest import models
from megatron_fp16rl.tools.selftest.result import Check, NotHere, Setting, at_least, at_most
from megatron_fp16rl.utils.files import write_json_lines

_RATIO, _NATS = 5, 0.006
_SAMPLES, _TOKENS = 32, 48


def mismatch(setting: Setting) -> list[Check]:
    """A server of each dtype samples, one after the other; then the learner scores."""
    if installed.version("sglang") is None:
        raise NotHere("SGLang is not installed")
    from megatron_fp16rl.tools.study.run import Study, run

    model, prompts = setting.folder / "model", setting.folder / "prompts.jsonl"
    models.built(model)
    sums = [{"problem": f"{a}+{a + 1}="} for a in range(8)]
    write_json_lines(prompts, sums)
    study = Study(
        *(model, ("fp16", "bf16"), prompts, _SAMPLES, _TOKENS),
        template="none",
        compared=0,
        deterministic=False,  # seeds change a GPU's kernels
    )
    result = run(study, setting.folder / "study", print)
    fp16 = next(row for row in result["rows"] if row["dtype"] == "fp16")
    ratio = (result["bf16_over_fp16"] or {}).get("logprob_abs_mean", 0.0)
    return [
        at_least("bf16 over fp16, mean |difference| of log-probs", ratio, _RATIO),
        at_most("fp16, nats", fp16["logprob_abs_mean"], _NATS),
    ]
