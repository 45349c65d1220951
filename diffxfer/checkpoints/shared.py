"""What the threads of a run find out about tensors together, so that each does a part of the work.

Without this, every thread that quantises a part of a block would compute the whole block.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeVar

from diffxfer.errors import DiffxferError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_MAX_BYTES = 64 << 20
_AT_LEAST = 6
"""Adjacent chunks may need these findings at once: about three tensors each."""


class Shared:
    """Findings about tensors, kept while they fit; the last ones are always kept.

    Args:
        max_bytes: the most memory for findings, except for the last ones.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # The tensor is kept too, so that its id cannot become another tensor's.
        self._known: OrderedDict[tuple[int, object], tuple[object, int, Any]] = OrderedDict()
        self._size = 0

    def of(self, stored: object, key: object, size: int, make: Callable[[], T]) -> T:
        """A finding about a tensor; it is made if it is not known.

        Args:
            stored: the tensor, the same object for every thread.
            key: which finding.
            size: its size in bytes.
            make: makes an empty finding, quickly.
        """
        place = id(stored), key
        with self._lock:
            known = self._known.get(place)
            if known is None:
                known = self._known[place] = stored, size, make()
                self._size += size
                while self._size > self._max_bytes and len(self._known) > _AT_LEAST:
                    self._size -= self._known.popitem(last=False)[1][1]
            else:
                self._known.move_to_end(place)
            found: T = known[2]
            return found


class Together:
    """Work in parts, each of which is done by one of the threads that need all of it.

    Args:
        parts: the number of parts.
    """

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._next, self._missing, self._failed = 0, parts, False
        self._changed = threading.Condition()

    def finish(self, work: Callable[[int], None]) -> None:
        """Do parts until none is left, and wait for those that other threads do.

        Args:
            work: does a part, by its number; it may do a part twice.

        Raises:
            DiffxferError: of the first part that fails, whichever thread met it.
        """
        if not self._join(work):
            # As one thread would: the same failure, whatever the threads have done.
            for part in range(self._parts):
                work(part)

    def _join(self, work: Callable[[int], None]) -> bool:
        """Take part; returns False if a part has failed."""
        while (part := self._take()) is not None:
            done = False
            try:
                work(part)
                done = True
            except DiffxferError:
                return False
            finally:
                self._end(done=done)
        with self._changed:
            self._changed.wait_for(lambda: self._failed or not self._missing)
            return not self._failed

    def _take(self) -> int | None:
        with self._changed:
            if self._failed or self._next == self._parts:
                return None
            self._next += 1
            return self._next - 1

    def _end(self, *, done: bool) -> None:
        with self._changed:
            self._missing -= done
            self._failed |= not done
            self._changed.notify_all()
