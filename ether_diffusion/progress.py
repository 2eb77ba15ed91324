"""Progress bars: on a terminal only, on the main process only."""

from __future__ import annotations

import shutil
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, *, initial: int = 0, shown: bool = True) -> tqdm[Any]:
    """A bar with rate and time left. A terminal that does not tell its size, as in some containers, is 80 x 24."""
    columns, rows = shutil.get_terminal_size((80, 24))
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        ncols=min(120, columns),
        nrows=rows,
        disable=None if shown else True,  # None: shown if the output is a terminal
    )
