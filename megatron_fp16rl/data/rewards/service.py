"""A reward service over HTTP: all responses of a step in one request."""

import asyncio
import json
import os
import time
from collections.abc import Sequence

import httpx

from megatron_fp16rl.data.rewards import Grade, Row, as_reward
from megatron_fp16rl.recipe import HttpReward, RecipeError

_MAX_BACKOFF_S = 30
_MOST_SAID, _MOST_FOR_EACH = 2**16, 2**8  # bytes of an answer, and more for each response


class ServiceDown(RuntimeError):
    """The service refused, or did not answer as it should after all retries."""


class Service:
    """Grades rows by a service. If it stays down, each response is an error."""

    def __init__(self, settings: HttpReward) -> None:
        """Raises RecipeError if the variable of the token is not set."""
        self.settings = settings
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if settings.token_variable is not None:
            token = os.environ.get(settings.token_variable)
            if not token:
                raise RecipeError(
                    f"task.reward.token_variable: ${settings.token_variable} is not set; "
                    "export it where fp16rl is started"
                )
            self._headers["Authorization"] = f"Bearer {token}"
        try:
            httpx.URL(settings.url)
        except httpx.InvalidURL as error:
            raise RecipeError(f"task.reward.url={settings.url}: {error}") from None

    def __call__(self, rows: Sequence[Row]) -> list[Grade]:
        """One number for each row. Without rows, nothing is asked."""
        if not rows:
            return []
        try:
            values = self._ask(rows)
        except ServiceDown as error:
            return [Grade(0.0, error=str(error))] * len(rows)
        return [_grade(value) for value in values]

    def _ask(self, rows: Sequence[Row]) -> list[object]:
        body = [{"prompt": r.prompt, "response": r.response, "answer": r.answer} for r in rows]
        content = json.dumps(body).encode()
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(min(_MAX_BACKOFF_S, self.settings.backoff_s * 2 ** (attempt - 1)))
            try:
                status, said = asyncio.run(self._try(content, len(rows)))
            except TimeoutError:
                seconds = f"{self.settings.timeout_s:g} s (task.reward.timeout_s)"
                reason = f"TimeoutError: no whole answer in {seconds}"
                continue
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return self._numbers(said, len(rows))
            reason = f"status {status}: {_short(said)}"
            if status < 500 and status not in (408, 429):
                break  # it will not have us; asking again would not help
        raise ServiceDown(f"{self.settings.url}, tried {attempt + 1} times: {reason}")

    async def _try(self, content: bytes, count: int) -> tuple[int, bytes]:
        """Status and body of an answer. Raises TimeoutError, httpx.RequestError and ServiceDown.

        The time is of the whole: httpx's own limits are of each read, and a service that sends a byte now
        and then would hold the step for ever.
        """
        limit, said = _MOST_SAID + _MOST_FOR_EACH * count, b""
        timeout_s = self.settings.timeout_s
        timeouts = httpx.Timeout(timeout_s, connect=min(10, timeout_s))
        async with asyncio.timeout(timeout_s), httpx.AsyncClient(timeout=timeouts) as client:
            asked = client.stream("POST", self.settings.url, content=content, headers=self._headers)
            async with asked as answer:
                if answer.has_redirect_location:
                    said = f"a redirect to {answer.headers['Location']}: give that as url".encode()
                    return answer.status_code, said
                async for part in answer.aiter_bytes():
                    said += part
                    if len(said) > limit:
                        raise ServiceDown(
                            f"{self.settings.url} answered with over {limit} bytes in place of {count} numbers"
                        )
                return answer.status_code, said

    def _numbers(self, said: bytes, count: int) -> list[object]:
        try:
            values = json.loads(said)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, list) or len(values) != count:
            raise ServiceDown(
                f"{self.settings.url} must answer with a JSON list of {count} numbers, "
                f"not with {_short(said)}"
            )
        return values


def _short(said: bytes) -> str:
    return said[:500].decode(errors="replace")


def _grade(value: object) -> Grade:
    try:
        return Grade(as_reward(value))
    except ValueError as error:
        return Grade(0.0, error=str(error))
