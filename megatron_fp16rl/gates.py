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
        if not gate.at_end and _is_number(rows[-1].get(gate.metric)):
            (stops if gate.action == "stop" else said).extend(_broken(gate, rows))
    if stops:
        raise GateStop("; ".join(stops))
    return said


def judge(gates: Sequence[Gate], rows: Rows) -> list[str]:
    """What is out of bounds at the end of a run with these metrics: nothing, if it passed.

    All gates are asked, of the last `window` rows that have their metrics.
    """
    return [reason for gate in gates for reason in _broken(gate, rows)]


def _broken(gate: Gate, rows: Rows) -> list[str]:
    values = [row[gate.metric] for row in rows if _is_number(row.get(gate.metric))]
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


def _check_name(gate: Gate, rows: Rows) -> None:
    """A misspelt metric would never ring: every metric has appeared by the first evaluation."""
    known = {key for row in rows for key in row}
    if gate.metric not in known and "eval/accuracy" in known:
        near = difflib.get_close_matches(gate.metric, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise RecipeError(f"gates: there is no metric {gate.metric!r}; {hint}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
