"""Errors that commands show as their message alone, without a traceback, each with its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and where. Commands exit with code 2."""


class TrainingFailed(RuntimeError):
    """Training cannot continue; the message says at which step, why, and what to do. Commands exit with code 1."""


class Interrupted(Exception):
    """A signal stopped the work, and its progress is saved. `signum` is 2 (Ctrl-C), 15 (SIGTERM) or 1 (a hang-up).

    Commands exit with code 128 + `signum`.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Notice(UserWarning):
    """What a user should know although nothing failed, in one line. Commands print it after their name."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest allowed word, or an empty string if none is near."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
