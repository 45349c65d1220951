"""Computing the factors of many matrices: several at a time, within a bound of memory."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.diffs.lora.factorise import factorise
from diffxfer.diffs.lora.read_delta import DeltaReader
from diffxfer.streaming.run import default_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from diffxfer.diffs.jobs.job import RunOptions
    from diffxfer.diffs.lora.factorise import Factorisation, Matrix
    from diffxfer.diffs.lora.options import LoraOptions

_BUDGET_BYTES = 256 << 20
"""The most bytes of the matrices in memory, unless one alone is larger."""


class Sized(Protocol):
    """A matrix of Δ."""

    @property
    def seed(self) -> str:
        """Decides the random start of its decomposition."""

    @property
    def dtype(self) -> str:
        """Finetuned's dtype, as safetensors names it."""

    @property
    def elements(self) -> int:
        """Its number of elements."""


T = TypeVar("T", bound=Sized)


def factorise_all(
    parts: Sequence[T],
    read: Callable[[DeltaReader, T], tuple[Matrix, float]],
    options: LoraOptions,
    run: RunOptions,
) -> Iterator[tuple[T, Factorisation, float]]:
    """Read and factorise the Δ of each part.

    Each matrix is computed by one thread, so that the factors do not depend on the number of
    threads; and several threads of torch for one matrix took twice the processor time of one.

    Args:
        parts: matrices of Δ.
        read: reads one, and the sum of its squares.
        options: what the adapter is like.
        run: the number of threads, and the device.

    Yields:
        Each part in order, its factors, and the sum of squares of its Δ.

    Raises:
        DiffxferError: if a tensor cannot be read, or is not finite.
    """
    device = _device(run.device)
    workers = (run.threads or default_threads()) if device == "cpu" else 1
    local = threading.local()

    def work(part: T) -> tuple[Factorisation, float]:
        if not hasattr(local, "reader"):
            local.reader = DeltaReader(one_at_a_time())
        matrix, squares = read(local.reader, part)
        ranks, seed, dtype = options.ranks, part.seed, options.dtype or part.dtype
        made = factorise(matrix, ranks, seed=seed, exact=options.exact, device=device, dtype=dtype)
        return made, squares

    with _one_thread_each(), ThreadPoolExecutor(workers) as pool:
        running: deque[tuple[T, Future[tuple[Factorisation, float]]]] = deque()
        try:
            for part in parts:
                while running and (len(running) >= workers or not _fits(part, running)):
                    first, future = running.popleft()
                    yield first, *future.result()
                running.append((part, pool.submit(work, part)))
            while running:
                first, future = running.popleft()
                yield first, *future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _fits(part: Sized, running: Iterable[tuple[Sized, object]]) -> bool:
    held = sum(other.elements for other, _ in running)
    return (held + part.elements) * 4 <= _BUDGET_BYTES


def _device(asked: str) -> str:
    """Where torch computes."""
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch compute each matrix by one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
