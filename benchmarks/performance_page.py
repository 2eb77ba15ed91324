"""Writes what the benchmarks print into docs/performance.md, each into its own part of the page."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


def command() -> str:
    """The command that runs, as one types it in the checkout."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def publish(part: str, text: str, write: bool) -> None:
    """Print a part's text; with `write`, put it between the part's two marks on the page as well."""
    print(text)
    if not write:
        return
    begin, end = f"<!-- {part}: written by benchmarks/{Path(sys.argv[0]).name} --write -->", f"<!-- {part}: end -->"
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE}: no part between {begin!r} and {end!r}.")
    PAGE.write_text(pattern.sub(lambda _: f"{begin}\n\n{text.strip()}\n\n{end}", page), encoding="utf-8")
