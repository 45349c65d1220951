"""What a piece of work needs of a node, and how messages count it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_PIECE_BYTES, _THREAD_BYTES = 400_000_000, 64_000_000
"""The memory that Ray sets aside for a piece, and for each of its threads."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a piece of work needs of a node.

    Attributes:
        threads: processors.
        gpus: GPUs; a part of one is a fraction.
        memory: bytes.
    """

    threads: int
    gpus: float
    memory: int

    @classmethod
    def of_piece(cls, threads: int, gpus: float = 0, memory: int | None = None) -> Needs:
        """The needs of a piece; the memory of a part of a plan if none is given."""
        return cls(threads, gpus, memory or _PIECE_BYTES + threads * _THREAD_BYTES)

    def places(self, nodes: Iterable[dict[str, Any]]) -> int:
        """How many such pieces can run at once.

        Args:
            nodes: the nodes, as `ray.nodes` describes them.
        """
        wanted = {"CPU": self.threads, "GPU": self.gpus, "memory": self.memory}
        return sum(
            min(int(node["Resources"].get(kind, 0) / need) for kind, need in wanted.items() if need)
            for node in nodes
        )

    def nowhere(self) -> ClusterError:
        """The error for a cluster that has no node left with so much."""
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        what = f"{many(self.threads, 'processor')}{gpus} and {self.memory / 1e9:.1f} GB of memory"
        problem = f"no node has {what} for Ray"
        return ClusterError("--ray", problem, "start nodes that have, and run it again")


def many(count: int, what: str) -> str:
    """A number of things, in words."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def counts_of(counts: Sequence[float]) -> str:
    """What each node has, in words."""
    return ", ".join(f"{count:g}" for count in counts) or "none"
