"""How two checkpoints differ: data, without I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.diffs.inspection.measures import Cell, Measure


@dataclass(frozen=True, slots=True)
class TensorContrast:
    """How one float tensor differs.

    Attributes:
        name: A's name.
        other_name: B's name, which may have a different prefix.
        dtype: A's dtype, as safetensors names it.
        other_dtype: B's dtype.
        shape: the shape of both.
        unchanged: number of equal elements: bit for bit, or by value if dtypes differ.
        measure: how much they differ; None if A or B has NaN or infinity.
    """

    name: str
    other_name: str
    dtype: str
    other_dtype: str
    shape: tuple[int, ...]
    unchanged: int
    measure: Measure | None

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        measure = found.pop("measure")
        return {**found, **({} if measure is None else measure.as_json()), "finite": bool(measure)}


@dataclass(frozen=True, slots=True)
class BytesContrast:
    """How a non-float tensor differs: only its bytes are compared.

    Attributes:
        name: A's name.
        dtype: the dtype of both.
        size: in bytes.
        unchanged: number of equal bytes.
    """

    name: str
    dtype: str
    size: int
    unchanged: int


@dataclass(frozen=True, slots=True)
class Unlike:
    """A tensor that cannot be compared, because its shape or dtype differs in A and B.

    Attributes:
        name: A's name.
        found: dtype and shape in A, such as ``"BF16 (128256, 4096)"``.
        other: dtype and shape in B.
    """

    name: str
    found: str
    other: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two checkpoints differ; Δ is B − A.

    Attributes:
        path: A.
        other: B.
        norms: the measure over all float tensors without NaN or infinity.
        cells: the same measure by layer and kind of module.
        tensors: each float tensor that both have, in A's order.
        bytes_compared: each other tensor that both have.
        unlike: tensors that both have, with shapes or dtypes that cannot be compared.
        only_in_path: tensors that B lacks.
        only_in_other: tensors that A lacks.
        bytes_read: bytes of tensors read from both.
        elapsed_s: seconds from the call to the result.
        warnings: one line each.
    """

    path: Path
    other: Path
    norms: Measure
    cells: tuple[Cell, ...]
    tensors: tuple[TensorContrast, ...]
    bytes_compared: tuple[BytesContrast, ...]
    unlike: tuple[Unlike, ...]
    only_in_path: tuple[str, ...]
    only_in_other: tuple[str, ...]
    bytes_read: int
    elapsed_s: float
    warnings: tuple[str, ...]

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """The tensors that have NaN or infinity, and so are left out of the norms."""
        return tuple(tensor.name for tensor in self.tensors if tensor.measure is None)

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        from dataclasses import asdict

        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **found,
            "path": str(self.path),
            "other": str(self.other),
            "norms": self.norms.as_json(),
            "nonfinite": self.nonfinite,
            "cells": [cell.as_json() for cell in self.cells],
            "tensors": [tensor.as_json() for tensor in self.tensors],
            "bytes_compared": [asdict(each) for each in self.bytes_compared],
            "unlike": [asdict(each) for each in self.unlike],
        }
