"""How a problem is put to a model: the text before its response."""

from megatron_fp16rl.recipe import RecipeError, Template

# Of the templates that we write out. A tokenizer that lacks one would spell it, and mean nothing.
MARKS = {
    "r1_distill": ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),  # noqa: RUF001
    "qwen_math": ("<|im_start|>", "<|im_end|>"),
}


def check(template: Template, tokenizer: object) -> None:
    """Raises RecipeError if the template is not for this tokenizer."""
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            "task.template=chat: the model's tokenizer has no chat template; for a base model use none"
        )
    for mark in MARKS.get(template, ()):
        if len(tokenizer.encode(mark, add_special_tokens=False)) != 1:
            raise RecipeError(
                f"task.template={template}: {mark} is no token of the model's tokenizer; "
                "use chat, or none for a base model"
            )


def render(template: Template, problem: str, instruction: str, tokenizer: object) -> str:
    """The prompt. An empty instruction is left out.

    chat: the tokenizer's own chat template, one user message.
    r1_distill: DeepSeek-R1's distilled models: no system prompt, the instruction with the problem, and
        a response that begins in thought (https://github.com/deepseek-ai/DeepSeek-R1, usage
        recommendations). For their own tokenizers the same as chat.
    qwen_math: Qwen2.5-Math, its base models too: the instruction is the system prompt
        (https://github.com/QwenLM/Qwen2.5-Math, qwen25-math-cot).
    none: problem and instruction, nothing else.
    """
    asked = f"{problem}\n\n{instruction}" if instruction else problem
    match template:
        case "chat":
            return tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
            )
        case "r1_distill":
            begin, user, assistant = MARKS[template]
            return f"{begin}{user}{asked}{assistant}<think>\n"
        case "qwen_math":
            turns = [("system", instruction)] if instruction else []
            turns.append(("user", problem))
            said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
            return f"{said}<|im_start|>assistant\n"
    return asked
