"""The one exception that means "the user can fix this".

Launchers print its message on one line of standard error and exit with code 2; anything else is a
defect and keeps its traceback. Library code raises it wherever the cause is an argument, a file or
a setting rather than a bug, and the message says what to do.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: a flag, a config field, a file, a shape."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the candidate nearest to `name`, or `""`."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.4)
    return f"; did you mean '{close[0]}'?" if close else ""
