"""Prompt templates: the text before a response, and its tokens."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_fp16rl.recipe import Problems, RecipeError, Template

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase

# Of the templates that we write out. A tokenizer that lacks one would spell it, and mean nothing.
MARKS = {
    "r1_distill": ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),  # noqa: RUF001
    "qwen_math": ("<|im_start|>", "<|im_end|>"),
}
TraceFunction = Callable[[FrameType, str, Any], "TraceFunction | None"]
_MOST_LINES = 1_000_000  # of a chat template; real ones run through some hundred
_PROBE = "What is 1 plus 1?"
# Some tokenizers drop the space that a text begins with: a response is read behind so many tokens.
_BEFORE = 5
_PLAIN = ("r1", "none")  # as a base model was trained: text begins as the tokenizer begins texts
R1 = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
    "The Assistant first thinks about the reasoning process in the mind and then provides the User with "
    "the answer. The reasoning process is enclosed within <think> </think> and answer is enclosed within "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> "
    "answer here </answer>.\nUser: ",
    "\nAssistant: <think>",
)


def check(settings: Problems, tokenizer: "PreTrainedTokenizerBase", problem: str = _PROBE) -> None:
    """Raises RecipeError if the template, or one of its options, is not for this tokenizer.

    A chat template is a program of the model's author: it is rendered once, with `problem`.
    """
    template, chat = settings.template, getattr(tokenizer, "chat_template", None)
    if template == "chat" and not chat:
        raise RecipeError(
            "task.template=chat: the model's tokenizer has no chat template; for a base model use none"
        )
    for name in settings.template_options or {}:
        if not re.search(rf"\b{re.escape(name)}\b", str(chat)):
            raise RecipeError(
                f"task.template_options.{name}: the chat template of the model's tokenizer reads no such "
                "variable; set it to null"
            )
    for mark in MARKS.get(template, ()):
        if len(tokenizer.encode(mark, add_special_tokens=False)) != 1:
            raise RecipeError(
                f"task.template={template}: {mark} is no token of the model's tokenizer; "
                "use chat, or none for a base model"
            )
    if template == "chat":
        with _at_most(_MOST_LINES):
            render(settings, problem, tokenizer)
            text = render(settings, _PROBE, tokenizer)
        if _PROBE not in text:
            raise RecipeError(
                f"task.template=chat: {_template_of(tokenizer)} leaves out what the user says: of "
                f"{_PROBE!r} it makes {text[:200]!r}"
            )


def render(settings: Problems, problem: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The prompt. An empty instruction is left out.

    chat: the tokenizer's own chat template, one user message.
    r1_distill: DeepSeek-R1's distilled models: no system prompt, the instruction with the problem, and
        a response that begins in thought (https://github.com/deepseek-ai/DeepSeek-R1, usage
        recommendations). For their own tokenizers the same as chat.
    qwen_math: Qwen2.5-Math, its base models too: the instruction is the system prompt
        (https://github.com/QwenLM/Qwen2.5-Math, qwen25-math-cot).
    r1: DeepSeek-R1-Zero's question to a base model (arXiv 2501.12948, table 1), in the words of
        https://github.com/sail-sg/Precision-RL, oat/main.py; the response ends with </answer>.
    none: problem and instruction, nothing else.
    """
    template, instruction = settings.template, settings.instruction
    question = f"{problem}\n\n{instruction}" if instruction else problem
    match template:
        case "chat":
            return chat(question, tokenizer, settings.template_options or {})
        case "r1_distill":
            begin, user, assistant = MARKS[template]
            return f"{begin}{user}{question}{assistant}<think>\n"
        case "qwen_math":
            turns = [("system", instruction)] if instruction else []
            turns.append(("user", problem))
            text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
            return f"{text}<|im_start|>assistant\n"
        case "r1":
            return question.join(R1)
    return question


def chat(question: str, tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any]) -> str:
    """What the tokenizer's chat template makes of a user's message. Raises RecipeError."""
    try:
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, **options
        )
    except Exception as error:  # whatever somebody's template raises
        raise RecipeError(
            f"task.template=chat: {_template_of(tokenizer)} fails for {question[:60]!r}: "
            f"{type(error).__name__}: {error}. Mend it, or take another task.template"
        ) from error
    return str(text)


def reply(settings: Problems, text: str, ended: bool, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What follows a turn of the model when an environment says `text`: with a chat template, a user's message.

    ended: the turn has the token that ends one; it is not written again.
    """
    if settings.template != "chat":
        return text
    # As the template has them: a question, an answer, and the message behind it. (Some templates leave out
    # parts of earlier answers: none is of ours.)
    said = [("user", _PROBE), ("assistant", _PROBE), ("user", text)]
    messages = [{"role": role, "content": content} for role, content in said]
    options = {**(settings.template_options or {}), "add_generation_prompt": True}
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    after = whole.split(_PROBE, 2)[-1]
    end = str(tokenizer.eos_token or "")
    return after.removeprefix(end) if ended else after


def _template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    return f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'}"


@contextlib.contextmanager
def _at_most(lines: int) -> Iterator[None]:
    """Ends templates that run on: raises RuntimeError in one after so many lines of it.

    Lines, not seconds: a busy machine must not refuse what another takes.
    """
    left = lines

    def count(frame: FrameType, event: str, argument: Any) -> TraceFunction | None:
        nonlocal left
        if frame.f_code.co_filename != "<template>":  # as Jinja calls what it compiles
            return None
        left -= 1
        if left < 0:
            raise RuntimeError(f"it has not ended after {lines:,} lines")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def encode(template: Template, text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens of a prompt.

    Plain text starts with the beginning-of-sequence token if the tokenizer itself adds it, as
    Llama-3's does and Qwen's does not; the other templates write out all special tokens.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    begin = getattr(tokenizer, "bos_token_id", None)
    if template in _PLAIN and begin is not None and tokenizer.encode(text)[:1] == [begin]:
        return ids if ids[:1] == [begin] else [begin, *ids]
    return ids


def decode(prompt: list[int], response: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Text of a response, without special tokens: what is graded is what is learnt.

    The server's own text is not always that: SGLang 0.5.23 cuts it at the first stop string, also where
    it is one only because text passes over a special token in its middle.
    """

    def text(ids: list[int]) -> str:
        return str(
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    before = prompt[-_BEFORE:]
    return text(before + response)[len(text(before)) :]
