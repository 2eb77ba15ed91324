"""Errors that are shown as their message alone, without a traceback, and the exit codes that they end commands with."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and where. Commands exit with code 2."""


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to do. Commands exit with code 1."""


class Interrupted(Exception):
    """Work stopped at a signal, and what was done is saved. `signum` is 2 (Ctrl-C) or 15 (SIGTERM).

    Commands exit with 128 more than that.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def exit_code(name: str, work: Callable[[], object]) -> int:
    """Do a command's work. What goes wrong becomes an exit code and its message, each line after the command's name."""
    try:
        work()
    except UserError as error:
        return _fail(name, error, 2)
    except TrainingFailed as error:
        return _fail(name, error, 1)
    except Interrupted as error:
        return _fail(name, error, 128 + error.signum)
    except KeyboardInterrupt:
        return _fail(name, "Stopped.", 130)
    return 0


def _fail(name: str, message: object, code: int) -> int:
    for line in str(message).splitlines():
        print(f"{name}: {line}", file=sys.stderr)
    return code


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest allowed word, or an empty string if none is near."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
