"""Reads and writes files in a thread, while the device computes what comes before or after them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], ahead: int = 2) -> Iterator[Result]:
    """`map(read, items)`, with so many results made before they are taken. Errors are raised where they would be."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def write_behind(write: Callable[..., object], behind: int = 8) -> Iterator[Callable[..., None]]:
    """Yields what calls `write` in a thread. At most so many calls wait; all have ended when the block does.

    Raises:
        Exception: as `write`, at a later call or at the end of the block.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[object]] = deque()

        def call(*args: Any, **options: Any) -> None:
            waiting.append(pool.submit(write, *args, **options))
            while len(waiting) > behind or (waiting and waiting[0].done()):
                waiting.popleft().result()

        yield call
        while waiting:
            waiting.popleft().result()
