"""What a folder of weights is: data, without I/O."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.diffs.artifact.distances import distances_as_json

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.diffs.artifact.distances import Distance
    from diffxfer.diffs.artifact.manifest import SourceEntry
    from diffxfer.diffs.inspection.adapter import AdapterFacts
    from diffxfer.diffs.inspection.measures import Cell, Measure, Size
    from diffxfer.diffs.soundness.finding import Finding


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one dtype and shape whose names differ only in numbers.

    Attributes:
        pattern: their names with every number replaced by ``*``.
        dtype: as safetensors names it, such as ``"BF16"``.
        shape: one size a dimension.
        tensors: number of tensors.
        parameters: total number of elements.
        encoding: how they are encoded, such as ``"E4M3, blocks of 128 × 128"``; empty if they are
            not. `dtype` is then that of the decoded values.
        bits: the bits on disk for each parameter, with scales.
    """

    pattern: str
    dtype: str
    shape: tuple[int, ...]
    tensors: int
    parameters: int
    encoding: str = ""
    bits: float = 0.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """The description of a folder of weights.

    Attributes:
        path: the folder, or its id on the Hub.
        kind: ``"checkpoint"`` or ``"adapter"``, or from its manifest ``"diff"``, ``"graft"`` or
            ``"tuned"``.
        architecture: the architecture in its config; for a diff vector, finetuned's.
        quantized: the quantisation method, None if it does not look quantised.
        tensors: number of tensors.
        parameters: number of elements.
        dtypes: number of elements by dtype, the largest first.
        groups: the tensors, grouped.
        shards: the size of each safetensors file in bytes.
        companions: companions that a graft of it would copy.
        other_files: all other files.
        sources: its sources by role; empty if there is no manifest.
        options: the options that affect the result, with the verb.
        written_by: the version of diffxfer that wrote it, None if diffxfer did not.
        integers: for a diff vector, finetuned's integer tensors, which have no difference.
        left_out: for a diff vector, finetuned's tensors that the user left out.
        added_tensors: for a diff vector, finetuned's tensors that base lacks, stored whole.
        inexact: for a diff vector, number of elements that base + Δ does not give back bit for bit;
            None if it is lossy.
        norms: for a diff vector, its size over all tensors.
        cells: for a diff vector, its size by layer and kind of module.
        warnings: one line each.
        findings: contradictions between its files.
        adapter: for a LoRA adapter, what it says of itself.
        encodings: the formats that its tensors are decoded from.
        bits_per_weight: for a quantised checkpoint, the bits on disk for each parameter of its
            encoded tensors, with scales; None for others.
        lossy: for a diff vector packed with a loss, the error of each tensor.
        sizes: number of parameters by layer and kind of module; for an adapter, of the factors.
    """

    path: Path
    kind: str
    architecture: str | None
    quantized: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    groups: tuple[TensorGroup, ...]
    shards: dict[str, int]
    companions: tuple[str, ...]
    other_files: tuple[str, ...]
    sources: dict[str, SourceEntry]
    options: dict[str, Any]
    written_by: str | None
    integers: tuple[str, ...]
    left_out: tuple[str, ...]
    added_tensors: tuple[str, ...]
    inexact: int | None
    norms: Measure | None
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...]
    findings: tuple[Finding, ...]
    adapter: AdapterFacts | None = None
    encodings: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    bits_per_weight: float | None = None
    lossy: tuple[Distance, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **found,
            "path": str(self.path),
            "groups": [asdict(group) for group in self.groups],
            "sources": {role: entry.model_dump() for role, entry in self.sources.items()},
            "norms": self.norms and self.norms.as_json(),
            "cells": [cell.as_json() for cell in self.cells],
            "sizes": [size.as_json() for size in self.sizes],
            "findings": [asdict(finding) for finding in self.findings],
            "adapter": self.adapter and asdict(self.adapter),
            "lossy": distances_as_json(self.lossy) if self.lossy else None,
        }
