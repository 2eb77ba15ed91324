"""Turns the errors of a command into one line each and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .errors import Interrupted, TrainingFailed, UserError
from .files import os_error_line


def exit_code(name: str, work: Callable[[], object]) -> int:
    """Do a command's work; 0 if it succeeds.

    An error that the user can act on is printed as its message, each line after the command's name, and becomes the
    command's exit code: 2 for bad input and for what the operating system refuses (a full disk, a missing permission),
    1 for training that fails, 128 + the signal's number for an interruption. Any other error is raised.
    """
    try:
        work()
    except UserError as error:
        return _fail(name, error, 2)
    except OSError as error:
        return _fail(name, os_error_line(error), 2)
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
