"""Mathematical problems from a JSONL file, graded by math-verify."""

import functools
import json
import random
from pathlib import Path

from megatron_fp16rl.batch import Prompt
from megatron_fp16rl.recipe import MathTask, RecipeError


class Math:
    """Each line of the file: {"problem": "...", "answer": "..."}."""

    def __init__(self, settings: MathTask, tokenizer: object, seed: int) -> None:
        self.settings, self.tokenizer, self.seed = settings, tokenizer, seed
        problems = read_problems(Path(settings.path))
        random.Random(settings.seed).shuffle(problems)
        count = round(len(problems) * settings.held_out)
        self.held_out, self.training = problems[:count], problems[count:]

    def training_prompts(self, step: int, count: int) -> list[Prompt]:
        """The next `count` problems; every epoch has an order of its own."""
        return [self._prompt(*self._at(step * count + i)) for i in range(count)]

    def held_out_prompts(self, count: int) -> list[Prompt]:
        """The first of the held-out problems."""
        return [self._prompt(*problem) for problem in self.held_out[:count]]

    def reward(self, prompt: Prompt, response: str) -> float:
        """1 if math-verify finds the response's answer equal to the problem's, else 0."""
        from math_verify import parse, verify

        gold = parse(f"\\boxed{{{prompt.answer}}}")
        return float(verify(gold, parse(response)))

    def _at(self, position: int) -> tuple[str, str]:
        epoch, index = divmod(position, len(self.training))
        return self.training[_epoch_order(len(self.training), f"{self.seed}/{epoch}")[index]]

    def _prompt(self, problem: str, answer: str) -> Prompt:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{problem}\n\n{self.settings.instruction}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        return Prompt(text, self.tokenizer.encode(text, add_special_tokens=False), answer)


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def read_problems(path: Path) -> list[tuple[str, str]]:
    """(problem, answer) of every line. Raises RecipeError naming file, line and what is wrong."""
    if not path.exists():
        raise RecipeError(f"task.path: there is no file {path}; give one with --set task.path=FILE")
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            problems.append((str(row["problem"]), str(row["answer"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RecipeError(
                f'{path}:{number}: want {{"problem": ..., "answer": ...}}, one a line; {error!r}'
            ) from None
    if not problems:
        raise RecipeError(f"{path} holds no problems")
    return problems
