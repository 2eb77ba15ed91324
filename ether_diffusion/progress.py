"""Progress bars: on a terminal only, on the main process only."""

from __future__ import annotations

import shutil
from typing import Any

from tqdm import tqdm


def progress_bar(
    total: int | None, description: str, unit: str, *, initial: int = 0, shown: bool = True, scaled: bool = False
) -> tqdm[Any]:
    """A bar with rate and time left. A terminal that does not tell its size, as in some containers, is 80 x 24.

    Args:
        total: None: not known.
        scaled: Show kilo, mega and giga of the unit.
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
