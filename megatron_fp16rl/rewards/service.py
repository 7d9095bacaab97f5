"""A reward service over HTTP: all responses of a step in one request."""

import os
import time
from collections.abc import Sequence

import httpx

from megatron_fp16rl.recipe import HttpReward, RecipeError
from megatron_fp16rl.rewards import Grade, Row, as_reward

_MAX_BACKOFF_S = 30


class ServiceDown(RuntimeError):
    """The service refused, or did not answer as it should after all retries."""


class Service:
    """Grades rows by a service. If it stays down, each response is an error."""

    def __init__(self, settings: HttpReward) -> None:
        """Raises RecipeError if the variable of the token is not set."""
        self.settings = settings
        headers = {}
        if settings.token_variable is not None:
            token = os.environ.get(settings.token_variable)
            if not token:
                raise RecipeError(
                    f"task.reward.token_variable: ${settings.token_variable} is not set; "
                    "export it where fp16rl is started"
                )
            headers["Authorization"] = f"Bearer {token}"
        timeout = httpx.Timeout(settings.timeout_s, connect=min(10, settings.timeout_s))
        self._http = httpx.Client(headers=headers, timeout=timeout)

    def __call__(self, rows: Sequence[Row]) -> list[Grade]:
        """One number for each row. Without rows, nothing is asked."""
        if not rows:
            return []
        try:
            values = self._ask(rows)
        except ServiceDown as error:
            return [Grade(0.0, error=str(error))] * len(rows)
        return [_grade(value) for value in values]

    def close(self) -> None:
        """Closes the connection."""
        self._http.close()

    def _ask(self, rows: Sequence[Row]) -> list[object]:
        body = [{"prompt": r.prompt, "response": r.response, "answer": r.answer} for r in rows]
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(min(_MAX_BACKOFF_S, self.settings.backoff_s * 2 ** (attempt - 1)))
            try:
                answer = self._http.post(self.settings.url, json=body)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == 200:
                return self._numbers(answer, len(rows))
            reason = f"status {answer.status_code}: {answer.text[:500]}"
            if answer.status_code < 500 and answer.status_code not in (408, 429):
                break  # it will not have us; asking again would not help
        raise ServiceDown(f"{self.settings.url}, tried {attempt + 1} times: {reason}")

    def _numbers(self, answer: httpx.Response, count: int) -> list[object]:
        try:
            values = answer.json()
        except ValueError:
            values = None
        if not isinstance(values, list) or len(values) != count:
            raise ServiceDown(
                f"{self.settings.url} must answer with a JSON list of {count} numbers, "
                f"not with {answer.text[:500]}"
            )
        return values


def _grade(value: object) -> Grade:
    try:
        return Grade(as_reward(value))
    except ValueError as error:
        return Grade(0.0, error=str(error))
