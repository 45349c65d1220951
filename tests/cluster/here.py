# ruff: noqa: ARG002 its methods take what those of a real cluster take
"""A cluster of this process alone: what goes to a node, and comes back, is pickled as by Ray."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer.errors import DiffxferError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.stored import ShardFile


cloudpickle = pytest.importorskip("ray.cloudpickle")


@dataclass
class Here:
    """Does every piece in this process, one after the other.

    Attributes:
        size: the bytes of a part.
        stop_after: raise after so many pieces, as a driver does that is interrupted.
        pieces: how many it was given, run by run.
    """

    size: int = 200
    stop_after: int | None = None
    pieces: list[int] = field(default_factory=list)

    def part_bytes(self, total_bytes: int, threads: int, gpus: float = 0) -> int:
        return self.size

    def threads(self, wanted: int | None) -> int:
        return wanted or 2

    def check_folders(self, partial: Path | None, inputs: Sequence[ShardFile]) -> None:
        assert partial is None or partial.is_dir()

    def run(
        self,
        function: Callable[..., Any],
        work: Sequence[Any],
        *,
        name: str,
        threads: int,
        gpus: float = 0,
        memory: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Generator[tuple[int, Any], None, None]:
        self.pieces.append(len(work))
        done = [0] * len(work)
        for index, piece in enumerate(work):
            if index == self.stop_after:
                raise KeyboardInterrupt

            def report(moved: int, index: int = index) -> None:
                done[index] = moved
                if progress is not None:
                    progress(sum(done))

            sent = pickle.loads(cloudpickle.dumps((function, piece)))
            try:
                value = sent[0](sent[1], report)
            except DiffxferError as exc:
                raise pickle.loads(pickle.dumps(exc)) from None
            yield index, pickle.loads(pickle.dumps(value))
