"""A game: the model asks 27? for a secret number, and reads + where it is larger, - where it is smaller."""

import random
import re


class Guess:
    """The problem is a range, 20-26:, the answer a number in it. Whoever asks for that wins."""

    def reset(self, problem: str, answer: str) -> None:
        low, high = re.findall(r"\d+", problem)
        self.low, self.high, self.secret = int(low), int(high), int(answer)
        self.won = False

    def step(self, turn: str) -> str | None:
        asked = re.fullmatch(r"(\d\d)\?", turn)
        if asked is None:
            return None  # no question: the game is lost
        number = int(asked[1])
        self.won = number == self.secret
        if self.won:
            return None
        if number < self.secret:
            self.low = max(self.low, number + 1)
            return "+"
        self.high = min(self.high, number - 1)
        return "-"

    def reward(self) -> float:
        return float(self.won)

    def expert(self) -> str:
        """Any number that is left: it knows the rules, and does not halve the range."""
        return f"{random.randint(self.low, self.high):02}?"
