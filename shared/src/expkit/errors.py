"""The one error that means: the user asked for something that cannot be done."""

from __future__ import annotations


class UsageError(ValueError):
    """Wrong use. The message is one line: what was wrong, the value, and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """
