"""A calculator: the model writes [7*85], reads 595=, and answers with its next turn."""

import re


class Calculator:
    """A turn that ends with ] is a call; any other is the answer, which ends the sample."""

    def reset(self, problem: str, answer: str) -> None:
        self.problem, self.answer, self.last = problem, answer, ""

    def step(self, turn: str) -> str | None:
        call = re.fullmatch(r"\[(\d{1,9})\*(\d{1,9})\]", turn)
        if call:
            self.last = str(int(call[1]) * int(call[2]))
            return f"{self.last}="
        if turn.endswith("]"):
            return "?="  # no product
        self.last = turn
        return None

    def reward(self) -> float:
        return float(self.last == self.answer)

    def expert(self) -> str:
        return self.last or f"[{self.problem.removesuffix('=')}]"
