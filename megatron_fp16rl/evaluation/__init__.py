"""Evaluating a model on suites of problems: `fp16rl eval`."""
