"""Base classes of errors. Imported by everything, so this module imports nothing."""

from __future__ import annotations


class ExplainedError(RuntimeError):
    """An error whose message suffices: what is wrong, where (file, key, value), and the remedy.

    Commands print the message in place of a traceback; see cli/common.py.
    """


class FinalError(ExplainedError):
    """An error that a restart does not cure. Ranks that fail with one are not restarted."""
