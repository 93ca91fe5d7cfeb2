"""Errors meant for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

USAGE = 2  #: exit status for a wrong word on the command line


class UserError(Exception):
    """A mistake the user can mend: one sentence saying what was given, what was expected and how to fix it.

    The command line prints it without a traceback and exits with ``status``; a notebook shows the sentence alone.
    """

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"UserError: {self}"]


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of ``choices``, or an empty string when none is close."""
    choices = list(choices)
    begun = [choice for choice in choices if choice.startswith(f"{word}_")]
    match = begun or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
