"""Benchmarks: collectives, learner, rollout, sync and whole steps. A module's `measure` returns the result.

Machines differ and drift: where there is a baseline, it is measured in the same run, turn by turn.
"""
