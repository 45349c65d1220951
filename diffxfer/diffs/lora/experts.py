"""Factors of experts that transformers stacks into one parameter, as PEFT stores them.

PEFT wraps the module with such parameters once for each of them, the first one innermost. The
factors of all experts have one rank and lie in one pair of matrices: ``lora_A`` of shape
(experts · rank, in), and ``lora_B`` of shape (out, rank · experts).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from diffxfer.diffs.lora.held import Held
from diffxfer.diffs.lora.parts import Form

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.diffs.delta.loaded_names import LoadedNames, Piece, Stacked
    from diffxfer.diffs.lora.factorise import Factorisation, Matrix
    from diffxfer.diffs.lora.output import AdapterOutput
    from diffxfer.diffs.lora.parts import Part
    from diffxfer.diffs.lora.read_delta import DeltaReader

_LEAVES = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Expert:
    """The Δ of one expert in a stacked parameter.

    Attributes:
        stacked: the parameter.
        number: the number of the expert.
        parts: the tensors of Δ that it is made of; those that are left out have no Δ.
    """

    stacked: Stacked
    number: int
    parts: tuple[tuple[Piece, Part], ...]

    @property
    def seed(self) -> str:
        """Decides the random start of its decomposition."""
        return f"{self.stacked.name}.{self.number}"

    @property
    def dtype(self) -> str:
        """Finetuned's dtype, as safetensors names it."""
        return self.parts[0][1].dtype

    @property
    def elements(self) -> int:
        """Its number of elements."""
        return self.stacked.shape[1] * self.stacked.shape[2]

    @property
    def stored_bytes(self) -> int:
        """The bytes to read from finetuned."""
        return sum(part.stored_bytes for _, part in self.parts)


def read_expert(reader: DeltaReader, expert: Expert) -> tuple[Matrix, float]:
    """The Δ of an expert, and the sum of its squares.

    Args:
        reader: reads Δ.
        expert: the expert.
    """
    made, total = np.zeros(expert.stacked.shape[1:], np.float32), 0.0
    for piece, part in expert.parts:
        matrix, squares = reader.matrix(part)
        made[piece.row : piece.row + piece.shape[0]] = matrix
        total += squares
    return made, total


def experts_of(parts: Sequence[Part], loaded: LoadedNames | None) -> list[Expert]:
    """The experts that have a Δ, in the order of their parameters.

    Args:
        parts: the tensors of Δ.
        loaded: the names of the loaded model.
    """
    by_name = {part.name: part for part in parts if part.form is Form.EXPERT}
    found = []
    for stacked in loaded.stacked.values() if loaded is not None and by_name else ():
        of_expert: dict[int, list[tuple[Piece, Part]]] = {}
        for piece in stacked.pieces:
            if piece.name in by_name:
                of_expert.setdefault(piece.expert, []).append((piece, by_name[piece.name]))
        found += [Expert(stacked, number, tuple(own)) for number, own in sorted(of_expert.items())]
    return found


@dataclass(slots=True)
class StackedFactors:
    """The stacked parameters of an adapter in the making.

    Attributes:
        made: the adapter.
        loaded: the names of the loaded model.
        experts: every expert with a Δ.
    """

    made: AdapterOutput
    loaded: LoadedNames | None
    experts: Sequence[Expert]
    _left: Counter[str] = field(default_factory=Counter)
    _waiting: list[tuple[Expert, Factorisation, float]] = field(default_factory=list)
    _held: dict[str, tuple[Expert, Held, Held]] = field(default_factory=dict)

    def add(self, expert: Expert, found: Factorisation, squares: float) -> None:
        """Take the factors of an expert; those of one parameter follow each other.

        Args:
            expert: the expert.
            found: its factors.
            squares: the sum of squares of its Δ.
        """
        self._waiting.append((expert, found, squares))
        if not self._left:
            self._left.update(each.stacked.name for each in self.experts)
        self._left[expert.stacked.name] -= 1
        if not self._left[expert.stacked.name]:
            self._hold(expert.stacked)
            self._waiting = []

    def plan(self) -> None:
        """Name the factors as far as they are known without reading Δ."""
        groups: dict[str, list[Expert]] = {}
        for expert in self.experts:
            groups.setdefault(expert.stacked.name, []).append(expert)
        for own in groups.values():
            rank = min(self.made.options.ranks.most, *own[0].stacked.shape[1:])
            shard = own[0].parts[0][1].difference.sources[0].shard
            shapes = _shapes(own[0].stacked, rank)
            a, b = (Held("", "F32", shape, shard, -1, 0, "") for shape in shapes)
            self._store(own, rank, a, b)

    def finish(self) -> None:
        """Write what was taken, under the names of PEFT's nested wrappers."""
        parameters = self.loaded.parameters if self.loaded is not None else ()
        order = [name for name in parameters if name in self._held]
        for place, name in enumerate(order):
            module = name.rpartition(".")[0]
            outer = [other for other in order[place + 1 :] if other.rpartition(".")[0] == module]
            expert, *pair = self._held[name]
            for leaf, held in zip(_LEAVES, pair, strict=True):
                self.made.write_factor(
                    f"{module}{'.base_layer' * len(outer)}{leaf}", held, expert.parts[0][1]
                )

    def _hold(self, stacked: Stacked) -> None:
        rank = max(found.rank for _, found, _ in self._waiting)
        own = [expert for expert, _, _ in self._waiting]
        if not rank:
            for part in _parts(own):
                self.made.leave(part)
            return
        a, b = _stack(stacked, rank, [(e.number, found) for e, found, _ in self._waiting])
        shard = own[0].parts[0][1].difference.sources[0].shard
        hold = self.made.holder.hold
        self._store(own, rank, hold("", a, shard), hold("", b, shard))
        total = sum(squares for *_, squares in self._waiting)
        lost = sum(squares * (1 - found.kept) for _, found, squares in self._waiting)
        entry = self.made.entry(_parts(own)[0], rank, total, 1 - lost / total, a.size + b.size)
        full = sum(part.elements for part in _parts(own)) / _parts(own)[0].elements
        update = {"form": Form.FACTORS.value, "full_bytes": round(entry.full_bytes * full)}
        self.made.entries[stacked.name] = entry.model_copy(update=update)

    def _store(self, own: Sequence[Expert], rank: int, a: Held, b: Held) -> None:
        self._held[own[0].stacked.name] = own[0], a, b
        self.made.stored.parameters[own[0].stacked.name] = rank
        for part in _parts(own):
            self.made.extracted(part)


def _parts(experts: Sequence[Expert]) -> list[Part]:
    return [part for expert in experts for _, part in expert.parts]


def _shapes(stacked: Stacked, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of both factors."""
    count, rows, columns = stacked.shape
    out, inner = (columns, rows) if stacked.transposed else (rows, columns)
    return (count * rank, inner), (out, rank * count)


def _stack(
    stacked: Stacked, rank: int, found: Sequence[tuple[int, Factorisation]]
) -> tuple[Matrix, Matrix]:
    """Both factors of all experts; those of a smaller rank are filled up with zeros."""
    count = stacked.shape[0]
    a, b = (np.zeros(shape, np.float32) for shape in _shapes(stacked, rank))
    of_a, of_b = a.reshape(count, rank, -1), b.reshape(-1, rank, count)
    for number, each in found:
        left, right = each.left, each.right
        if stacked.transposed:
            left, right = right.T, left.T
        of_a[number, : each.rank] = right
        of_b[:, : each.rank, number] = left
    return a, b
