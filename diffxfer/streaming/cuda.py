"""All that is CUDA's: streams, events, memory, and what it says when it fails.

Buffers live until `close` has waited for all streams, so no stream finds the memory of another
freed (`Tensor.record_stream` is for tensors that do not). What torch allocates may be memory that
was freed a moment ago, with kernels still to run on it, on the allocating thread's stream: all of
ours wait for that one first.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffxfer.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_REASON = 300


class Cuda:
    """A GPU with a stream for copies in, one for arithmetic, and one for copies out.

    Args:
        name: such as ``"cuda:0"``.

    Raises:
        DeviceError: if CUDA cannot start.
    """

    def __init__(self, name: str) -> None:
        self._device = torch.device(name)
        # Two threads that queue at once could mix their arithmetic, which shares its buffers.
        self._lock = threading.Lock()
        with self._explained():
            torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's
            self._in, self._compute, self._out = (
                torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's
                for _ in range(3)
            )

    def pinned(self, count: int) -> Tensor:
        """Memory here that the GPU copies from and to by itself: uint8, shape `(count,)`."""
        with self._explained(), torch.cuda.device(self._device):
            return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def memory(self, count: int) -> Tensor:
        """Memory of the GPU: uint8, shape `(count,)`."""
        with self._explained():
            memory = torch.empty(count, dtype=torch.uint8, device=self._device)
            allocating = torch.cuda.current_stream(self._device)
            for stream in (self._in, self._compute, self._out):
                stream.wait_stream(allocating)
            return memory

    def submit(
        self,
        arrive: tuple[Tensor, Tensor],
        compute: Callable[[], None],
        leave: tuple[Tensor, Tensor],
    ) -> torch.cuda.Event:
        """Queue copy in, arithmetic and copy out, each after the one before it; returns at once.

        What is submitted first is computed first, and never at the same time as another.

        Args:
            arrive: where to, on the GPU, and from where, pinned.
            compute: queues the arithmetic.
            leave: where to, pinned, and from where, on the GPU.
        """
        with self._lock, self._explained():
            with torch.cuda.stream(self._in):
                arrive[0].copy_(arrive[1], non_blocking=True)
                arrived = self._in.record_event()
            with torch.cuda.stream(self._compute):
                self._compute.wait_event(arrived)
                compute()
                computed = self._compute.record_event()
            with torch.cuda.stream(self._out):
                self._out.wait_event(computed)
                leave[0].copy_(leave[1], non_blocking=True)
                # Blocking: a thread that waits would otherwise keep a processor from the others.
                left = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's
                left.record(self._out)
                return left

    def wait(self, done: torch.cuda.Event) -> None:
        """Wait until all that was submitted for it is done.

        Raises:
            DeviceError: if the GPU failed.
        """
        with self._explained():
            done.synchronize()

    def close(self) -> None:
        """Wait until nothing is under way."""
        with self._explained():
            for stream in (self._in, self._compute, self._out):
                stream.synchronize()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Tell a GPU's failure from a mistake of ours, which is a RuntimeError too."""
        try:
            yield
        except RuntimeError as exc:
            reason = next(iter(str(exc).splitlines()), "")[:_REASON]
            if isinstance(exc, torch.OutOfMemoryError) or "out of memory" in reason:
                remedy = "give a smaller --device-memory, another --device, or cpu"
                raise DeviceError(str(self._device), reason, remedy) from exc
            if "CUDA" not in reason:
                raise
            remedy = "run it again to go on from what was done, with --device cpu if it stays so"
            raise DeviceError(str(self._device), reason, remedy) from exc
