"""Turns the errors of a command into one line each and an exit code."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from .errors import Interrupted, Notice, TrainingFailed, UserError
from .files import os_error_line


def exit_code(name: str, work: Callable[[], object]) -> int:
    """Do a command's work; 0 if it succeeds.

    An error that the user can act on is printed as its message, each line after the command's name, and becomes the
    command's exit code: 2 for bad input and for what the operating system refuses (a full disk, a missing permission),
    1 for training that fails, 128 + the signal's number for an interruption. Any other error is raised. A `Notice` is
    printed likewise, and changes no code.
    """
    with _notices_as_lines(name):
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
        except RuntimeError as error:
            if str(error) != _NO_HOME:
                raise
            return _fail(name, "the home directory that ~ in a path stands for is not known; write the path out", 2)
        return 0


_NO_HOME = "Could not determine home directory."  # of pathlib's expanduser


def _fail(name: str, message: object, code: int) -> int:
    for line in str(message).splitlines():
        print(f"{name}: {line}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _notices_as_lines(name: str) -> Iterator[None]:
    show = warnings.showwarning

    def show_line(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            print(f"{name}: {message}", file=sys.stderr)
        else:
            show(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        warnings.showwarning = show_line
        yield
