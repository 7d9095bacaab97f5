"""Benchmarks: collectives, learner, rollout, sync and whole steps.

Machines differ and drift, so every benchmark measures a baseline in the same run, turn by turn, and
reports ratios. A module has `measure`, which returns the result, and `VIEW`, which shows it.
"""
