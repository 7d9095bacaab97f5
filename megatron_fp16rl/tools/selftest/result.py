"""What rows measure, and the report of a selftest, which is what --json prints."""

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

Value = float | str


class NotHere(Exception):
    """A row cannot run on this machine; the message says why. No fault."""


class Setting(NamedTuple):
    """quick: small sizes, for CPUs. folder: empty, for the row's files."""

    quick: bool
    folder: Path


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Check(_Strict):
    """A measured value, the bound in words, and whether it holds."""

    name: str
    value: Value
    bound: str
    holds: bool


class Answer(_Strict):
    """What the process of a row leaves. not_here: why it could not run."""

    checks: list[Check] = []
    not_here: str | None = None


class RowResult(_Strict):
    """A row of the report.

    measured, bound   by the name of a check
    failed            names of the checks that do not hold
    source            where the bounds come from
    reason            why the row failed without a check, or is not here
    log               the end of what the row's process printed, if it did not get to its end
    """

    name: str
    host: str
    what: str
    status: Literal["pass", "fail", "not here"]
    measured: dict[str, Value]
    bound: dict[str, str]
    failed: list[str]
    source: str
    reason: str | None
    log: str | None
    seconds: float


class Report(_Strict):
    """passed: no row failed. machine: see bench.common.facts; of several the first, with all hosts."""

    passed: bool
    quick: bool
    machine: dict[str, Any]
    rows: list[RowResult]

    @property
    def shown(self) -> list[RowResult]:
        """For a reader: all rows of the first machine, and those that failed on others."""
        first = self.rows[0].host
        return [row for row in self.rows if row.host == first or row.status == "fail"]

    @property
    def summary(self) -> str:
        """In a line: how many rows have which status, and which failed."""
        several = len({row.host for row in self.rows}) > 1
        names: dict[str, list[str]] = {"pass": [], "fail": [], "not here": []}
        for row in self.rows:
            names[row.status].append(f"{row.name} on {row.host}" if several else row.name)
        counts = ", ".join(f"{len(of)} {status}" for status, of in names.items() if of)
        return f"{counts}; failed: {', '.join(names['fail'])}" if names["fail"] else counts


def at_most(name: str, value: float, limit: float) -> Check:
    """nan fails."""
    return _check(name, value, f"<= {limit:g}", bool(value <= limit))


def at_least(name: str, value: float, limit: float) -> Check:
    """nan fails."""
    return _check(name, value, f">= {limit:g}", bool(value >= limit))


def equal(name: str, value: Value, expected: Value) -> Check:
    """Of numbers that are known exactly, and of words."""
    shown = expected if isinstance(expected, str) else f"{expected:g}"
    return _check(name, value, f"= {shown}", value == expected)


def shown(name: str, value: Value) -> Check:
    """For the reader: it depends on the machine."""
    return _check(name, value, "-", True)


def _check(name: str, value: Value, bound: str, holds: bool) -> Check:
    if not isinstance(value, str):  # JSON has no nan and no inf
        value = float(value) if math.isfinite(value) else str(float(value))
    return Check(name=name, value=value, bound=bound, holds=holds)
