"""Rewards from a service over HTTP: all responses of a step in one request."""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import httpx

from megatron_fp16rl.data.rewards import Grade, Grader, Row, as_reward
from megatron_fp16rl.recipe import HttpReward, RecipeError

_MAX_BACKOFF_S = 30
_MAX_BODY_BYTES, _MAX_BYTES_PER_ROW = 2**16, 2**8  # of an answer: the sum of both


class ServiceDown(RuntimeError):
    """The service refused, or gave no valid answer after all retries."""


class Service(Grader):
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
        """One number for each row. Without rows there is no request."""
        if not rows:
            return []
        try:
            values = self._request(rows)
        except ServiceDown as error:
            return [Grade(0.0, error=str(error))] * len(rows)
        return [_grade(value) for value in values]

    def _request(self, rows: Sequence[Row]) -> list[Any]:
        body = [{"prompt": r.prompt, "response": r.response, "answer": r.answer} for r in rows]
        content = json.dumps(body).encode()
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(min(_MAX_BACKOFF_S, self.settings.backoff_s * 2 ** (attempt - 1)))
            try:
                status, answer = asyncio.run(self._try(content, len(rows)))
            except TimeoutError:
                seconds = f"{self.settings.timeout_s:g} s (task.reward.timeout_s)"
                reason = f"TimeoutError: no whole answer in {seconds}"
                continue
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return self._numbers(answer, len(rows))
            reason = f"status {status}: {_short(answer)}"
            if status < 500 and status not in (408, 429):
                break  # refused: a retry would not help
        raise ServiceDown(f"{self.settings.url}, tried {attempt + 1} times: {reason}")

    async def _try(self, content: bytes, count: int) -> tuple[int, bytes]:
        """Status and body of an answer. Raises TimeoutError, httpx.RequestError and ServiceDown.

        The time limit covers the whole answer. httpx's own limits are for single reads: a service that
        sends a byte now and then would hold the step for ever.
        """
        limit, body = _MAX_BODY_BYTES + _MAX_BYTES_PER_ROW * count, b""
        timeout_s = self.settings.timeout_s
        timeouts = httpx.Timeout(timeout_s, connect=min(10, timeout_s))
        async with asyncio.timeout(timeout_s), httpx.AsyncClient(timeout=timeouts) as client:
            request = client.stream(
                "POST", self.settings.url, content=content, headers=self._headers
            )
            async with request as answer:
                if answer.has_redirect_location:
                    body = f"a redirect to {answer.headers['Location']}: give that as url".encode()
                    return answer.status_code, body
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > limit:
                        raise ServiceDown(
                            f"{self.settings.url} answered with over {limit} bytes in place of {count} numbers"
                        )
                return answer.status_code, body

    def _numbers(self, body: bytes, count: int) -> list[Any]:
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, list) or len(values) != count:
            raise ServiceDown(
                f"{self.settings.url} must answer with a JSON list of {count} numbers, "
                f"not with {_short(body)}"
            )
        return values


def _short(body: bytes) -> str:
    return body[:500].decode(errors="replace")


def _grade(value: Any) -> Grade:
    try:
        return Grade(as_reward(value))
    except ValueError as error:
        return Grade(0.0, error=str(error))
