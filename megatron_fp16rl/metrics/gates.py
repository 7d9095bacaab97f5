"""Thresholds on metrics: a recipe's `gates` warn of a run that leaves its bounds, or stop it."""

import difflib
from collections.abc import Sequence
from typing import Any

from megatron_fp16rl.metrics.log import Row
from megatron_fp16rl.recipe import Gate, Recipe
from megatron_fp16rl.utils.errors import FinalError

Rows = Sequence[Row]


class GateStop(FinalError):
    """A gate with action: stop was broken."""


def of(recipe: Recipe) -> list[Gate]:
    """The gates of a recipe that apply: without fp16 there is no loss scale to look at."""
    scaled = recipe.precision.dtype == "fp16"
    return [gate for gate in recipe.gates if scaled or not gate.metric.startswith("fp16/")]


def check(gates: Sequence[Gate], rows: Rows) -> list[str]:
    """Warnings after the last of `rows`, the run's metrics so far.

    A gate looks at the mean of its metric over the last `window` rows that have it, whenever the last
    row has it. Raises GateStop for gates with action: stop.
    """
    warnings: list[str] = []
    stops: list[str] = []
    for gate in gates:
        if not gate.at_end and _is_number(rows[-1].get(gate.metric)):
            (stops if gate.action == "stop" else warnings).extend(_broken(gate, rows))
    if stops:
        raise GateStop("; ".join(stops))
    return warnings


def judge(gates: Sequence[Gate], rows: Rows) -> list[str]:
    """The broken gates at the end of a run; none if it passed. Every gate is checked.

    A mark that was not measured often enough is not reached.
    """
    reasons: list[str] = []
    for gate in gates:
        count = len(_values(gate, rows))
        if gate.at_end and count < gate.window:
            reasons.append(
                f"gate: {gate.metric} has {count} value(s), and its window is {gate.window}"
            )
        reasons += _broken(gate, rows)
    return reasons


def _values(gate: Gate, rows: Rows) -> list[float]:
    return [row[gate.metric] for row in rows if _is_number(row.get(gate.metric))]


def _broken(gate: Gate, rows: Rows) -> list[str]:
    values = _values(gate, rows)
    if len(values) < gate.window:
        return []
    mean = sum(values[-gate.window :]) / gate.window
    bounds = []
    if gate.above is not None and mean > gate.above:
        bounds.append(f"above {gate.above:g}")
    if gate.below is not None and mean < gate.below:
        bounds.append(f"below {gate.below:g}")
    over = f" (mean of {gate.window})" if gate.window > 1 else ""
    return [f"gate: {gate.metric} is {mean:.4g}{over}, {' and '.join(bounds)}"] if bounds else []


def unknown(gates: Sequence[Gate], rows: Rows) -> str | None:
    """What is wrong with the name of a metric. Called after an evaluation, when all metrics have appeared.

    A misspelled metric name would silently never trigger.
    """
    known = {key for row in rows for key in row}
    for gate in gates:
        if gate.metric not in known:
            near = difflib.get_close_matches(gate.metric, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            return f"gates: there is no metric {gate.metric!r}; {hint}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
