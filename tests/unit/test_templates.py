"""How a problem is put to a model, and how its response is read."""

import pytest
from pydantic import ValidationError

from megatron_fp16rl.data.tasks import make, templates
from megatron_fp16rl.recipe import DatasetTask, RecipeError
from tests.unit.test_tasks import MATH, Characters


def tokenizer_with(*marks):
    from transformers import PreTrainedTokenizerFast

    from megatron_fp16rl.models.build import character_tokenizer

    plain = character_tokenizer(["_", "$", *map(chr, range(32, 95))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    return tokenizer


def asks(template, instruction="BOX IT.", **more):
    values = {"template": template, "instruction": instruction, **more}
    return DatasetTask(kind="dataset", path=str(MATH), **values)


R1 = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")  # noqa: RUF001
QWEN = ("<|im_start|>", "<|im_end|>")


def test_templates_say_what_the_models_were_trained_on():
    system = "<|im_start|>system\nBOX IT.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    for settings, tokenizer, rendered in (
        (asks("r1_distill"), tokenizer_with(*R1), f"{R1[0]}{R1[1]}1+1?\n\nBOX IT.{R1[2]}<think>\n"),
        (asks("qwen_math"), None, f"{system}<|im_start|>assistant\n"),
        (asks("none", ""), None, "1+1?"),
        (asks("none"), None, "1+1?\n\nBOX IT."),
        (asks("chat", ""), Characters(), "<user>1+1?<assistant>"),
    ):
        assert templates.render(settings, "1+1?", tokenizer) == rendered
    rendered = templates.render(asks("r1", ""), "{1}+1?", None)
    assert rendered.startswith(
        "A conversation between User and Assistant. The User asks a question, "
    )
    assert rendered.endswith(" <answer> answer here </answer>.\nUser: {1}+1?\nAssistant: <think>")


def test_a_template_for_another_tokenizer_is_refused():
    for template, marks, message in (
        ("r1_distill", R1, None),
        ("qwen_math", QWEN, None),
        ("none", (), None),
        ("r1_distill", R1[:1], r"r1_distill: .*User.* is no token"),
        ("qwen_math", QWEN[:1], r"qwen_math: <\|im_end\|> is no token"),
        ("chat", (), "no chat template; for a base model use none"),
    ):
        if message is None:
            templates.check(asks(template), tokenizer_with(*marks))
            continue
        with pytest.raises(RecipeError, match=message):
            templates.check(asks(template), tokenizer_with(*marks))


@pytest.mark.parametrize("template", ["none", "r1", "qwen_math"])
@pytest.mark.parametrize("begins", [True, False], ids=["llama", "qwen"])
def test_plain_text_begins_as_the_models_tokenizer_begins_texts(template, begins, tmp_path):
    """As Llama-3's tokenizer and Qwen's: both know the token, and one puts it before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(*QWEN, "<b>")
    tokenizer.bos_token = "<b>"
    begin = tokenizer.convert_tokens_to_ids("<b>")
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<b> $A", special_tokens=[("<b>", begin)]
        )
    settings = asks(template, max_prompt_tokens=1000)
    task = make(settings, tokenizer, seed=0)
    for prompt in task.training_prompts(0, 3) + task.held_out_prompts(2):
        plain = tokenizer.encode(prompt.text, add_special_tokens=False)
        before = [begin] if begins and template != "qwen_math" else []
        assert prompt.ids == before + plain
        if template != "qwen_math":
            assert prompt.ids == tokenizer(prompt.text).input_ids


def test_variables_of_a_chat_template_reach_it():
    tokenizer = tokenizer_with()
    tokenizer.chat_template = (
        "{% for m in messages %}U{{ m.content }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}NO{% endif %}A"
    )
    off = asks("chat", "", template_options={"enable_thinking": False})
    assert templates.render(asks("chat", ""), "1", tokenizer) == "U1A"
    task = make(off, tokenizer, seed=0)
    assert all(p.text.endswith("NOA") for p in task.training_prompts(0, 2))
    unread = asks("chat", template_options={"enable_thoughts": False})
    with pytest.raises(RecipeError, match=r"template_options.enable_thoughts: .* reads no such"):
        templates.check(unread, tokenizer)
    with pytest.raises(ValidationError, match="template=none: set template: chat, or template_opt"):
        asks("none", template_options={"enable_thinking": False})


def test_a_response_keeps_the_space_that_it_begins_with():
    """Of a tokenizer that, as Llama-2's, drops the one before a text's first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: i for i, word in enumerate(["</s>", "\u2581Say", "\u2581one", "\u2581.", "\u2581n't"])
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", clean_up_tokenization_spaces=True
    )
    assert tokenizer.decode([2, 0], skip_special_tokens=True) == "one"
    assert templates.decode([1], [2, 0, 3, 4], tokenizer) == " one . n't"
    assert templates.decode([1] * 9, [], tokenizer) == ""
    assert templates.decode([0], [2], tokenizer) == "one"
