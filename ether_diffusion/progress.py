"""Progress: a bar on a terminal, else a line every half a minute, as for a log file; on the main process only."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

EVERY = 30.0
"""Seconds between lines. What takes less prints none."""
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} so far, {remaining} left, {rate_fmt}{postfix}"


def progress_bar(
    total: int | None, description: str, unit: str, *, initial: int = 0, shown: bool = True, scaled: bool = False
) -> tqdm[Any]:
    """A bar with rate and time left. A terminal without a known size, as in some containers, counts as 80 x 24.

    Args:
        total: Number of units; None: unknown.
        scaled: Show thousands of the unit as k, M and G.
    """
    common: dict[str, Any] = {"total": total, "initial": initial, "desc": description, "unit": unit}
    common |= {"unit_scale": scaled, "disable": not shown}
    if not sys.stderr.isatty():
        own = {"file": io.StringIO(), "leave": False}  # for the carriage return that ends a bar
        return _Lines(**common, **own, delay=EVERY, mininterval=EVERY, miniters=1, bar_format=LINE)
    columns, rows = shutil.get_terminal_size((80, 24))
    return tqdm(**common, ncols=min(120, columns), nrows=rows)


class _Lines(tqdm):
    """Prints lines in the place of a bar that is drawn again and again."""

    monitor_interval = 0  # no thread

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def print_status(text: str) -> None:
            if text:
                print(text, file=sys.stderr, flush=True)

        return print_status
