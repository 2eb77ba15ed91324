"""Progress bars: on a terminal only, on the main process only."""

from __future__ import annotations

import shutil
from typing import Any

from tqdm import tqdm


def progress_bar(
    total: int | None, description: str, unit: str, *, initial: int = 0, shown: bool = True, scaled: bool = False
) -> tqdm[Any]:
    """A bar with rate and time left. A terminal without a known size, as in some containers, counts as 80 x 24.

    Args:
        total: Number of units; None: unknown.
        scaled: Show thousands of the unit as k, M and G.
    """
    columns, rows = shutil.get_terminal_size((80, 24))
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=scaled,
        ncols=min(120, columns),
        nrows=rows,
        disable=None if shown else True,  # None: shown if the output is a terminal
    )
