"""What a command prints, where nobody reads it to its end, the disk is full, or a name cannot be shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def quiet_output() -> Iterator[None]:
    """Within the block, output that cannot be written is lost and the work goes on: `| head -1` stops no training.

    Characters that the terminal or file cannot encode are escaped.
    """
    streams = sys.stdout, sys.stderr
    wrapped: list[Any] = [stream and _Output(stream) for stream in streams]  # None: closed by the caller
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        for stream in filter(None, wrapped):
            stream.flush()
        sys.stdout, sys.stderr = streams


class _Output:
    """A stream like another one, whose writes do not fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._lose(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        """Send this and all later output nowhere, also what Python flushes when it exits."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        except (OSError, ValueError):  # no file of the system
            self._stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the command
        finally:
            os.close(nowhere)
        if not isinstance(error, BrokenPipeError) and self._stream is not sys.__stderr__:
            print(f"The output is incomplete: {error.strerror}.", file=sys.stderr)
