"""Pieces of work on a Ray cluster: started a few at a time, watched, and stopped."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from diffxfer.cluster.node_work import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_S = 0.3
_STOP_S, _KILL_S = 20.0, 10.0
"""How long a piece has to stop, and how long Ray to end its process."""


class Pieces:
    """Pieces of work that are queued, running or done.

    Args:
        ray: the module.
        start: hands a piece to Ray, by its index; returns Ray's reference to the result.
        stop_after: tells the pieces after one to stop.
        count: the number of pieces.
        most: the most pieces to have handed to Ray at once.
    """

    def __init__(
        self,
        ray: Any,
        start: Callable[[int], Any],
        stop_after: Callable[[int], object],
        count: int,
        most: int,
    ) -> None:
        self._ray: Any = ray  # most of its interface is not typed
        self._start = start
        self._stop_after = stop_after
        self._queue = deque(range(count))
        self._most = most
        self._running: dict[Any, int] = {}
        self._failures: dict[int, BaseException] = {}

    def left(self) -> bool:
        """Whether any piece is queued or running."""
        return bool(self._queue or self._running)

    def wait(self) -> list[tuple[int, Any]]:
        """Start pieces, and wait a moment; returns those that have ended."""
        while self._queue and len(self._running) < self._most:
            index = self._queue.popleft()
            self._running[self._start(index)] = index
        refs = [*self._running]
        ended, _ = self._ray.wait(refs, num_returns=1, timeout=_POLL_S)
        if ended:  # others have perhaps ended too
            ended, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return [(self._running.pop(ref), ref) for ref in ended]

    def fail(self, index: int, exc: BaseException) -> None:
        """Record a failure, and stop the pieces after it."""
        self._failures[index] = exc
        first = min(self._failures)
        self._queue = deque(other for other in self._queue if other < first)
        self._stop_after(first)

    def stop(self) -> None:
        """Stop what still runs, and wait for it, so that it does not write any longer."""
        self._queue.clear()
        running, self._running = [*self._running], {}
        if running:
            self._stop_after(-1)
            _, running = self._ray.wait(running, num_returns=len(running), timeout=_STOP_S)
        if running:
            for ref in running:
                self._ray.cancel(ref, force=True)
            self._ray.wait(running, num_returns=len(running), timeout=_KILL_S)

    def raise_first(self) -> None:
        """Raise the earliest failure, if there is one."""
        if self._failures:
            raise self._failures[min(self._failures)]


class Progress:
    """How much of all pieces is done, as the nodes report it.

    Args:
        ray: the module.
        strategy: where Ray runs the actor that they report to.
    """

    def __init__(self, ray: Any, strategy: Any) -> None:
        self._ray: Any = ray
        actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=strategy)(Tally)
        self.actor: Any = actor.remote()
        self._asked: Any = None
        self._done: dict[int, int] = {}

    def total(self) -> int:
        """The sum over all pieces, as far as it is known; never waits."""
        if self._asked is None:
            self._asked = self.actor.take.remote()
        if self._ray.wait([self._asked], timeout=0)[0]:
            asked, self._asked = self._asked, None
            try:
                found = self._ray.get(asked)
            except self._ray.exceptions.RayError:
                found = {}  # its node is lost, and Ray starts it elsewhere
            for index, done in found.items():
                self._done[index] = max(done, self._done.get(index, 0))
        return sum(self._done.values())

    def stop_after(self, index: int) -> None:
        """Tell the pieces after one to stop; all of them for −1."""
        self.actor.stop_after.remote(index)

    def close(self) -> None:
        """End the actor."""
        self._ray.kill(self.actor)


class Patience:
    """How long a run waits while no node of the cluster can take a piece.

    Args:
        limit_s: in seconds: a lost node may come back, or be replaced.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: float | None = None

    def is_over(self, places: int) -> bool:
        """Whether it has ended.

        Args:
            places: how many pieces can run at once now.
        """
        if places:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since > self._limit_s
