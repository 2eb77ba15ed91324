"""Reading ahead and writing behind: the same results in the same order, errors where they belong, and a bound."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from ether_diffusion.ahead import read_ahead, write_behind


def test_results_come_in_order_and_a_few_are_read_before_they_are_taken() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for k in range(6):
            taken.append(k)
            yield k

    results = read_ahead(lambda k: (k, threading.current_thread()), items(), ahead=2)
    first, thread = next(results)
    assert (first, taken) == (0, [0, 1, 2])
    assert thread is not threading.current_thread()
    assert [k for k, _ in results] == [1, 2, 3, 4, 5]
    assert list(read_ahead(str, [])) == []


def test_an_error_is_raised_in_its_place() -> None:
    results = read_ahead(lambda k: 1 // (2 - k), range(5), ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_all_is_written_when_the_block_ends() -> None:
    written: list[int] = []
    with write_behind(written.append, behind=2) as write:
        for k in range(20):
            write(k)
    assert written == list(range(20))


def test_at_most_a_few_writes_wait() -> None:
    started, go = [], threading.Event()

    def write(k: int) -> None:
        started.append(k)
        go.wait(10)

    with write_behind(write, behind=2) as call:
        call(0)
        call(1)
        threading.Timer(0.2, go.set).start()
        call(2)
        assert go.is_set()  # the third call waited for the first write


def test_an_error_of_a_write_is_raised_at_the_latest_when_the_block_ends() -> None:
    def full(k: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), write_behind(full) as write:
        write(1)
