"""A device made of this machine: memory of its own, and three queues that run beside the caller.

It takes the place of `Cuda` where there is no GPU, so that all but that class is run: the queues
begin late and at odd times, so that a buffer that is used again too soon, or read too early, gives
other bits. Memory is full of NaN until it is written.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class HostDone:
    """The result of `submit`, and its number."""

    def __init__(self, future: Future[None], number: int) -> None:
        self.future = future
        self.number = number

    def synchronize(self) -> None:
        self.future.result()


class HostDevice:
    """As `diffxfer.streaming.cuda.Cuda`.

    Attributes:
        allocated: bytes of the device's memory.
        most_under_way: how many device_batches were under way at once, at most.
        submitted: how many device_batches there were.
        closed: whether it was closed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.allocated = self.submitted = self.most_under_way = self._under_way = 0
        self.closed = False
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self._queues = [ThreadPoolExecutor(max_workers=1) for _ in range(3)]

    def pinned(self, count: int) -> Tensor:
        return torch.full((count,), 0xFF, dtype=torch.uint8)

    def memory(self, count: int) -> Tensor:
        with self._lock:
            self.allocated += count
        return torch.full((count,), 0xFF, dtype=torch.uint8)

    def submit(
        self,
        arrive: tuple[Tensor, Tensor],
        compute: Callable[[], None],
        leave: tuple[Tensor, Tensor],
    ) -> HostDone:
        with self._lock:
            self.submitted += 1
            self._under_way += 1
            self.most_under_way = max(self.most_under_way, self._under_way)
            arrived = self._queue(0, None, lambda: _copy(*arrive))
            computed = self._queue(1, arrived, compute)
            left = self._queue(2, computed, lambda: _copy(*leave))
            return HostDone(left, self.submitted)

    def _queue(
        self, number: int, after: Future[None] | None, work: Callable[[], None]
    ) -> Future[None]:
        delay = self._random.choice((0.0, 0.0, 0.001))

        def step() -> None:
            if after is not None:
                after.result()
            time.sleep(delay)
            work()

        return self._queues[number].submit(step)

    def wait(self, done: HostDone) -> None:
        done.synchronize()
        with self._lock:
            self._under_way -= 1

    def close(self) -> None:
        for queue in self._queues:
            queue.shutdown(wait=True)
        self.closed = True


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)
