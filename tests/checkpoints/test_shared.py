"""Work that threads do together."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from diffxfer.checkpoints.shared import Shared, Together
from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable


def in_threads(count: int, work: Callable[[], None]) -> list[BaseException]:
    """Run a function in several threads at once; returns what they raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except OptionError as exc:
            raised.append(exc)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return raised


def test_each_part_is_done_once_and_before_any_thread_goes_on() -> None:
    together = Together(7)
    met, done, complete = threading.Barrier(3), [], []

    def work(part: int) -> None:
        if part < 3:
            met.wait(30)  # no thread does all
        done.append(part)

    def take_part() -> None:
        together.finish(work)
        complete.append(sorted(done))

    assert in_threads(3, take_part) == []
    assert complete == [list(range(7))] * 3


def test_every_thread_raises_the_failure_that_one_thread_would() -> None:
    together = Together(3)
    met = threading.Barrier(3)
    first = [True] * 3

    def work(part: int) -> None:
        if first[part]:
            first[part] = False
            met.wait(30)
        if part > 0:
            raise OptionError("--x", f"part {part} is bad", "mend it")

    raised = in_threads(3, lambda: together.finish(work))
    assert [str(exc) for exc in raised] == [str(OptionError("--x", "part 1 is bad", "mend it"))] * 3
    with pytest.raises(OptionError, match="part 1 is bad"):
        together.finish(work)


def test_findings_are_kept_while_they_fit() -> None:
    shared, tensors = Shared(max_bytes=100), [object() for _ in range(11)]
    made: list[int] = []

    def find(number: int) -> None:
        shared.of(tensors[number], "most", 10, lambda: made.append(number))

    for number in (*range(10), 0, *range(2, 10)):
        find(number)
    assert made == [*range(10)]
    find(10)  # does not fit, and 1 was asked for least recently
    for number in (0, *range(2, 11)):
        find(number)
    assert made == [*range(11)]
    find(1)
    assert made == [*range(11), 1]


def test_a_tensor_has_several_findings() -> None:
    shared, one, other = Shared(), object(), object()
    assert shared.of(one, 1, 10, lambda: "first") == "first"
    assert shared.of(one, 2, 10, lambda: "second") == "second"
    assert shared.of(other, 1, 10, lambda: "third") == "third"
    assert shared.of(one, 1, 10, lambda: "new") == "first"


def test_the_last_findings_are_kept_whatever_their_size() -> None:
    shared, stored = Shared(max_bytes=100), object()
    made: list[int] = []

    def find(key: int) -> None:
        shared.of(stored, key, 1000, lambda: made.append(key))

    for key in (*range(6), *range(6)):
        find(key)
    assert made == [*range(6)]
    find(6)
    find(0)
    assert made == [*range(7), 0]
