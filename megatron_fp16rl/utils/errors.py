"""The base of all errors that a restart does not cure.

Imported by everything, and so importing nothing; see launch/rank.py for what hangs on it.
"""

from __future__ import annotations


class FinalError(RuntimeError):
    """Something cannot be used or done, and starting again would come to the same end.

    The message says what is wrong, where (file, key, value), and the remedy. Ranks that end with one
    are not started again; commands print it in the place of a traceback.
    """
