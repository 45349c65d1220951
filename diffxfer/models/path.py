"""A straight path between two models: (1 − t)·a + t·b."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.stored import FLOATS
from diffxfer.errors import MatchError, OptionError, listed
from diffxfer.models.source import ModelSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_STEP = 1 << 15
"""Elements that are mixed at once.

Their float64 copies take 256 KiB each: of larger ones, each thread that loads a model kept up to
64 MB after it had freed them.
"""


def path_source(a: ModelSource, b: ModelSource, t: float) -> ModelSource:
    """A point of the straight path from one model to another: (1 − t)·a + t·b.

    It is computed in float64 and rounded once to the dtype of `a`. At t = 0 and t = 1 the tensors
    have the bits of `a` and `b`. Tensors of integers are those of `a`, and must be equal in both.

    Args:
        a: where the path begins; its config and tokenizer are those of the result.
        b: where it ends. Both stay open, and belong to the caller.
        t: how far along the path, from 0 to 1.

    Raises:
        OptionError: if `t` is not from 0 to 1.
        MatchError: if names or shapes differ.
    """
    check_t(t)
    _refuse_different(a, b)
    return _PathSource(a, b, float(t))


def check_t(t: float) -> None:
    """Check how far along a path a point is.

    Args:
        t: from 0 to 1.

    Raises:
        OptionError: if it is not.
    """
    if not 0 <= t <= 1:
        raise OptionError("t", f"{t!r} is not from 0 to 1", "give a number from 0 to 1")


class _PathSource(ModelSource):
    def __init__(self, a: ModelSource, b: ModelSource, t: float) -> None:
        self.label = f"{1 - t:g}·{a.label} + {t:g}·{b.label}"
        self.folder = a.folder
        self._a, self._b, self._t = a, b, t

    def names(self) -> Iterator[str]:
        return self._a.names()

    def dtype(self, name: str) -> str:
        return (self._b if self._t == 1 else self._a).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._a.shape(name)

    def tensor(self, name: str) -> torch.Tensor:
        if self._a.dtype(name) not in FLOATS:
            return self._equal(name)
        if self._t == 0:
            return self._a.tensor(name)
        if self._t == 1:
            return self._b.tensor(name)
        made = self._a.tensor(name)
        ours, theirs = made.view(-1), self._b.tensor(name).view(-1)
        for start in range(0, len(ours), _STEP):
            part = slice(start, start + _STEP)
            mixed = ours[part].double() * (1 - self._t) + theirs[part].double() * self._t
            ours[part] = mixed.to(ours.dtype)
        return made

    def _equal(self, name: str) -> torch.Tensor:
        import torch

        found = self._a.tensor(name)
        if self._a.dtype(name) != self._b.dtype(name) or not torch.equal(
            found, self._b.tensor(name)
        ):
            raise MatchError(
                (),
                f"{name} has different {self._a.dtype(name)} values in {self._a.label} and"
                f" {self._b.label}, and only floats can be mixed",
                "give two models of the same family",
            )
        return found


def _refuse_different(a: ModelSource, b: ModelSource) -> None:
    ours, theirs = set(a.names()), set(b.names())
    remedy = "give two models with the same tensors, such as a graft and its target"
    for one, other, names in ((a, b, ours - theirs), (b, a, theirs - ours)):
        if names:
            problem = f"{one.label} has tensors that {other.label} lacks: {listed(sorted(names))}"
            raise MatchError((), problem, remedy)
    for name in a.names():
        shapes = a.shape(name), b.shape(name)
        floats = [source.dtype(name) in FLOATS for source in (a, b)]
        if shapes[0] != shapes[1]:
            problem = f"{name} is {shapes[0]} in {a.label} and {shapes[1]} in {b.label}"
            raise MatchError((), problem, remedy)
        if floats[0] != floats[1]:
            kinds = a.dtype(name), b.dtype(name)
            problem = f"{name} is {kinds[0]} in {a.label} and {kinds[1]} in {b.label}"
            raise MatchError((), problem, remedy)
