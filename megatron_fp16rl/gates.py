"""Alarms on metrics: a recipe's `gates` warn of, or stop, a run that leaves its bounds."""

import difflib
from collections.abc import Sequence

from megatron_fp16rl.recipe import Gate, RecipeError

Rows = Sequence[dict[str, object]]


class GateStop(RuntimeError):
    """A gate with action: stop was broken."""


def check(gates: Sequence[Gate], rows: Rows) -> list[str]:
    """What there is to warn of after the last of `rows`, the run's metrics so far.

    A gate looks at the mean of its metric over the last `window` rows that have it, each time that
    the last row has it. Raises GateStop, and RecipeError for a metric that does not exist.
    """
    said, stops = [], []
    for gate in gates:
        _check_name(gate, rows)
        values = [row[gate.metric] for row in rows if _is_number(row.get(gate.metric))]
        if not _is_number(rows[-1].get(gate.metric)) or len(values) < gate.window:
            continue
        mean = sum(values[-gate.window :]) / gate.window
        if reason := _broken(gate, mean):
            (stops if gate.action == "stop" else said).append(reason)
    if stops:
        raise GateStop("; ".join(stops))
    return said


def _broken(gate: Gate, mean: float) -> str | None:
    bounds = []
    if gate.above is not None and mean > gate.above:
        bounds.append(f"above {gate.above:g}")
    if gate.below is not None and mean < gate.below:
        bounds.append(f"below {gate.below:g}")
    over = f" (mean of {gate.window})" if gate.window > 1 else ""
    return f"gate: {gate.metric} is {mean:.4g}{over}, {' and '.join(bounds)}" if bounds else None


def _check_name(gate: Gate, rows: Rows) -> None:
    """A misspelt metric would never ring: every metric has appeared by the first evaluation."""
    known = {key for row in rows for key in row}
    if gate.metric not in known and "eval/accuracy" in known:
        near = difflib.get_close_matches(gate.metric, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise RecipeError(f"gates: there is no metric {gate.metric!r}; {hint}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
