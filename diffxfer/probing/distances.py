"""How far three or four models are from each other, in one pass over their tensors."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.fetch import fetch_shards
from diffxfer.diffs.inspection.places import places
from diffxfer.errors import listed
from diffxfer.probing.figures import Cell, Figures, Sums, by_kind, by_layer, by_place, figures
from diffxfer.probing.pair_direct import add_direct
from diffxfer.probing.pair_options import PairOptions, pair_options
from diffxfer.probing.pairing import Pairing, compared_elements, pair_models
from diffxfer.probing.standouts import Standout, find_standouts
from diffxfer.streaming.measure import measure_inputs
from diffxfer.streaming.plan import make_plan
from diffxfer.streaming.run import check_run_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from diffxfer.diffs.jobs.report import FateGroup
    from diffxfer.diffs.relations.relatedness import Relation
    from diffxfer.streaming.plan import Plan, TensorTask
    from diffxfer.streaming.statistics import TensorResult


@dataclass(frozen=True, slots=True)
class TensorDistance:
    """The distances in one tensor.

    Attributes:
        name: the target's name.
        figures: the figures; None if a model has NaN or infinity in it.
    """

    name: str
    figures: Figures | None


@dataclass(frozen=True, slots=True)
class Distances:
    """How far finetuned, base and target are from each other, and direct if there is one.

    Attributes:
        total: the figures over all tensors without NaN or infinity.
        layers: the same by layer.
        kinds: by kind of module.
        cells: by layer and kind of module.
        standouts: the cells that stand out, the farthest first.
        tensors: by tensor, in the order of the target's files.
        nonfinite: tensors with NaN or infinity, which are left out of all figures.
        not_measured: tensors that are not in all three models, or hold no floats, and why.
        rows_left_out: numbers of rows that not all three models have, by tensor and model.
        vocabulary: how rows of tokens were paired: ``"ids"``, ``"tokens"`` or ``"rows"``.
        relations: how the models relate, by sampled elements.
        bytes_read: bytes of tensors read.
        elapsed_s: seconds from the call to the result.
        warnings: one line each.
        notes: remarks on names; one line each.
    """

    total: Figures
    layers: tuple[Cell, ...]
    kinds: tuple[Cell, ...]
    cells: tuple[Cell, ...]
    standouts: tuple[Standout, ...]
    tensors: tuple[TensorDistance, ...]
    nonfinite: tuple[str, ...]
    not_measured: tuple[FateGroup, ...]
    rows_left_out: Mapping[str, Mapping[str, int]]
    vocabulary: str
    relations: tuple[Relation, ...]
    bytes_read: int
    elapsed_s: float
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON has, except for `tensors`: they may be many thousands."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del found["tensors"]
        for name in ("layers", "kinds", "cells", "standouts"):
            found[name] = [each.as_json() for each in found[name]]
        for name in ("not_measured", "relations"):
            found[name] = [asdict(each) for each in found[name]]
        return {**found, "total": self.total.as_json()}


def measure_distances(
    finetuned: Path | str,
    base: Path | str,
    target: Path | str,
    direct: Path | str | None = None,
    *,
    options: PairOptions | None = None,
    threads: int | None = None,
    stream: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Distances:
    """Measure how far three or four models are from each other; loads no model.

    Tensors and rows of tokens pair as in `transfer`. Unrelated models are no error: a warning says
    that they are unrelated.

    Args:
        finetuned: the fine-tuned model, or a LoRA adapter: a folder, or ``"org/name[@revision]"``.
        base: the model that finetuned was trained from, named the same way.
        target: the successor of base, named the same way.
        direct: the target's own fine-tune, or an adapter of the target; None if there is none.
        options: how they pair; None for the defaults of `transfer`.
        threads: number of workers; None for one per processor.
        stream: read models from the Hub without downloading them into its cache.
        progress: called with the bytes done and the total bytes.

    Returns:
        The distances.

    Raises:
        DiffxferError: if a model is not a sound checkpoint or changes while it is read, or if the
            models do not pair.

    Example:
        >>> measure_distances("sft", "llama-3.0", "llama-3.1").total.ratio  # doctest: +SKIP
    """
    began = time.perf_counter()
    check_run_options(threads, "cpu")
    options = options or pair_options()
    pairing = pair_models({"finetuned": finetuned, "base": base, "target": target}, options)
    tasks, shards, warnings = pairing.tasks, pairing.shards, pairing.warnings
    if direct is not None:
        more = add_direct(direct, target, pairing, options)
        tasks, shards = more.tasks, (*shards, *more.shards)
        warnings = (*warnings, *more.warnings)
    plan = make_plan(tasks, list(dict.fromkeys(shards)))
    if not stream:
        specs = [spec for task in tasks for spec in task.inputs]
        fetch_shards((part.shard for spec in specs for part in spec.parts), progress)
    results = measure_inputs(plan, threads=threads, progress=progress)
    return _distances(pairing, _sums(plan.tasks, results), plan, warnings, began)


def _sums(tasks: Iterable[TensorTask], results: Iterable[TensorResult]) -> dict[str, Sums]:
    """The sums of each tensor, by the target's name."""
    parts: dict[str, list[tuple[int, tuple[float, ...]]]] = {}
    for task, result in zip(tasks, results, strict=True):
        own = parts.setdefault(task.name, [])
        if result.sums:
            own.append((compared_elements(task), result.sums))
    return {name: Sums(tuple(own)) for name, own in parts.items()}


def _distances(
    pairing: Pairing,
    sums: Mapping[str, Sums],
    plan: Plan,
    warnings: Sequence[str],
    began: float,
) -> Distances:
    where = places(pairing.roles["target"].checkpoint.tensors)
    finite = {name: each for name, each in sums.items() if each.is_finite}
    measured = [(where[name], each) for name, each in finite.items()]
    nonfinite = tuple(name for name in sums if name not in finite)
    if nonfinite:
        line = f"tensors with NaN or infinity are left out of all figures: {listed(nonfinite)}"
        warnings = [*warnings, line]
    if not sums:
        line = "no tensor of floats is in all three models and selected: nothing was measured"
        warnings = [*warnings, line]
    cells = by_place(measured)
    return Distances(
        total=figures(finite.values()),
        layers=by_layer(measured),
        kinds=by_kind(measured),
        cells=cells,
        standouts=find_standouts(cells),
        tensors=tuple(
            TensorDistance(name, figures([each]) if name in finite else None)
            for name, each in sums.items()
        ),
        nonfinite=nonfinite,
        not_measured=pairing.not_measured,
        rows_left_out=pairing.rows_left_out,
        vocabulary=pairing.mode,
        relations=pairing.relations,
        bytes_read=plan.bytes_to_read,
        elapsed_s=round(time.perf_counter() - began, 3),
        warnings=tuple(warnings),
        notes=pairing.notes,
    )
