"""Everything specific to CUDA: streams, events, memory and errors.

Buffers live until `close` has waited for all streams, so no stream uses freed memory
(`Tensor.record_stream` is for shorter-lived tensors). Torch may allocate memory that was just
freed while kernels on the allocating thread's stream still use it, so all our streams wait for
that stream first.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffxfer.errors import DeviceError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Cuda:
    """A GPU with a stream for copies in, one for arithmetic, and one for copies out.

    Args:
        name: such as ``"cuda:0"``.

    Raises:
        DeviceError: if CUDA cannot start.
    """

    def __init__(self, name: str) -> None:
        self._device = torch.device(name)
        # Batches share the work buffers, so two threads must not interleave their kernels.
        self._lock = threading.Lock()
        with self._explained():
            torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's
            self._in, self._compute, self._out = (
                torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's
                for _ in range(3)
            )

    def pinned(self, count: int) -> Tensor:
        """Pinned host memory, for asynchronous copies: uint8, shape `(count,)`."""
        with self._explained(), torch.cuda.device(self._device):
            return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def memory(self, count: int) -> Tensor:
        """GPU memory: uint8, shape `(count,)`."""
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
        """Queue copy in, arithmetic and copy out, in this order; returns immediately.

        Batches are computed in the order of submission, one at a time.

        Args:
            arrive: destination on the GPU, and pinned source.
            compute: queues the arithmetic.
            leave: pinned destination, and source on the GPU.
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
                # Blocking: a waiting thread would otherwise keep a CPU core busy.
                left = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's
                left.record(self._out)
                return left

    def wait(self, done: torch.cuda.Event) -> None:
        """Wait until the submitted work is done.

        Raises:
            DeviceError: if the GPU failed.
        """
        with self._explained():
            done.synchronize()

    def close(self) -> None:
        """Wait for all streams."""
        with self._explained():
            for stream in (self._in, self._compute, self._out):
                stream.synchronize()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Translate GPU failures into `DeviceError`; bugs of ours stay RuntimeErrors."""
        try:
            yield
        except RuntimeError as exc:
            reason = first_line(exc)
            if isinstance(exc, torch.OutOfMemoryError) or "out of memory" in reason:
                remedy = "give a smaller --device-memory, or another --device such as cpu"
                raise DeviceError(str(self._device), reason, remedy) from exc
            if "CUDA" not in reason:
                raise
            remedy = "run it again to continue, with --device cpu if the error persists"
            raise DeviceError(str(self._device), reason, remedy) from exc
