"""The loss along the straight path between two models, beside a control."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from diffxfer.errors import MatchError, OptionError
from diffxfer.models.loading import load, load_tokenizer, refill
from diffxfer.models.memory import free_memory
from diffxfer.models.path import path_source
from diffxfer.probing.barrier import find_barrier, mean_loss
from diffxfer.probing.losses import BATCH_SIZE, row_losses
from diffxfer.probing.permute import permuted_source
from diffxfer.probing.row_data import borrow_template

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from diffxfer.models.loading import LoadedModel
    from diffxfer.models.source import ModelSource
    from diffxfer.probing.losses import RowLosses
    from diffxfer.probing.row_data import ProbeRows
    from diffxfer.probing.rows import TokenRow

    _Measured: TypeAlias = tuple[RowLosses, list[dict[str, Any]]]

POINTS = 11
"""The default number of points of a path, the ends included."""
_IGNORED_SETTINGS = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "id2label", "label2id"),
    "max_position_embeddings",
}
"""Settings of a config that do not change what a model computes for a row."""


@dataclass(frozen=True, slots=True)
class PathPoint:
    """A place on a path.

    Attributes:
        t: how far along the path, 0 at the first end and 1 at the second.
        loss: the mean loss per scored token of all rows, or per row of a classifier, in nats.
        loss_stderr: its standard error over rows; None for a single row.
        accuracy: the share of scored tokens, or of a classifier's rows, predicted right.
        scores: what the scorer returned, if there was one.
    """

    t: float
    loss: float
    loss_stderr: float | None
    accuracy: float
    scores: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class MeasuredPath:
    """The loss along the straight path between two models.

    Attributes:
        ends: the names of the two models.
        control: whether one end is a permuted copy, whose function is that of the model.
        points: the places, in order of t.
        barrier: the maximum over the path of loss − the straight line between the ends' losses.
        interval: its 95 % interval over rows; None for a single row.
        rows: the number of rows.
        tokens: the number of scored tokens; for a classifier, of rows.
        note: what a reader must know of the path, in words; None if there is nothing.
    """

    ends: tuple[str, str]
    control: bool
    points: tuple[PathPoint, ...]
    barrier: float
    interval: tuple[float, float] | None
    rows: int
    tokens: int
    note: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The path as JSON values; numbers that are not finite are None."""
        values: dict[str, Any] = _finite(asdict(self))
        return values


@dataclass(frozen=True, slots=True)
class SkippedPath:
    """A path that cannot be measured.

    Attributes:
        ends: the names of the two models.
        control: whether one end would be a permuted copy.
        reason: why it is left out, in words.
    """

    ends: tuple[str, str]
    control: bool
    reason: str

    def as_json(self) -> dict[str, Any]:
        """The ends and the reason as JSON values."""
        return {**asdict(self), "ends": list(self.ends)}


def measure_path(
    a: ModelSource,
    b: ModelSource,
    rows: ProbeRows,
    *,
    points: int = POINTS,
    control: bool = False,
    batch_size: int = BATCH_SIZE,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    score: Callable[[Any, Any], list[dict[str, Any]]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MeasuredPath | SkippedPath:
    """Measure the loss, and its barrier, along the straight path between two models.

    Weights are mixed in float64 and rounded once to the dtype on disk. One model is in memory; the
    tensors of the ends are read again at each point, and nothing is written.

    Args:
        a: the end at t = 0, whose config the model has at each point.
        b: the end at t = 1.
        rows: the rows, which the tokenizers of both ends must tokenize alike.
        points: the number of places, evenly spaced, the ends included.
        control: whether one end is a permuted copy.
        batch_size: the maximum number of rows that the model is given at once.
        device: where the model is.
        dtype: the dtype to compute in; None for float32 on a CPU, and on a GPU that of the weights.
        seed: of the resamples for the interval.
        score: called with the model and the tokenizer at each point, for its `scores`.
        progress: called with the number of points done and the total.

    Returns:
        The path, or the reason why it cannot be measured.

    Raises:
        OptionError: if there are fewer than two points.
        DiffxferError: if a model cannot be read or loaded, or a row cannot be tokenized.
    """
    if points < 2:
        raise OptionError("points", f"{points} is less than the two ends", "give 11")
    prepared = _prepare(a, b, rows)
    if isinstance(prepared, str):
        return SkippedPath((a.label, b.label), control, prepared)
    tokens, note = prepared
    ts = [place / (points - 1) for place in range(points)]

    def measure(loaded: LoadedModel) -> _Measured:
        losses = row_losses(loaded.model, tokens, batch_size=batch_size, device=device)
        return losses, [] if score is None else score(loaded.model, loaded.tokenizer)

    try:
        measured = _measure_along(a, b, ts, measure, device, dtype, progress)
    finally:
        free_memory()
    return _summarise((a.label, b.label), control, ts, measured, seed, note)


def _measure_along(
    a: ModelSource,
    b: ModelSource,
    ts: Sequence[float],
    measure: Callable[[LoadedModel], _Measured],
    device: str,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None] | None,
) -> list[_Measured]:
    """Measure one model, with the weights of each place in turn."""
    import torch

    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    loaded = load(path_source(a, b, ts[0]), dtype=dtype, device=device)
    found: list[_Measured] = []
    for t in ts:
        if found:
            refill(loaded, path_source(a, b, t))
        found.append(measure(loaded))
        if progress is not None:
            progress(len(found), len(ts))
    return found


def measure_control(
    a: ModelSource, b: ModelSource, rows: ProbeRows, *, seed: int = 0, **options: Any
) -> MeasuredPath | SkippedPath:
    """Measure the path from a model to a permuted copy of another.

    The copy computes what `b` computes, so the ends' losses are those of the path from `a` to `b`;
    its heads and MLP units are in another order, so the weights between the ends match nothing.

    Args:
        a: the end at t = 0.
        b: the model that is permuted, at t = 1.
        rows: the rows.
        seed: of the permutations, and of the resamples for the interval.
        options: further arguments of `measure_path`.

    Returns:
        The path, or the reason why it cannot be measured.
    """
    permuted, what = permuted_source(b, seed)
    if permuted is None:
        return SkippedPath((a.label, b.label), True, what)
    return measure_path(a, permuted, rows, control=True, seed=seed, **options)


def _prepare(
    a: ModelSource, b: ModelSource, rows: ProbeRows
) -> tuple[Sequence[TokenRow], str | None] | str:
    """The tokens of the rows and a note, or the reason why the path cannot be measured."""
    tokenizers = load_tokenizer(a), load_tokenizer(b)
    for source, tokenizer in zip((a, b), tokenizers, strict=True):
        if tokenizer is None:
            return f"{source.label} has no tokenizer"
    try:
        path_source(a, b, 0)
    except MatchError as exc:
        return exc.problem
    borrow_template(rows, tokenizers)
    ours, theirs = (rows.tokenize(tokenizer) for tokenizer in tokenizers)
    if ours != theirs:
        return (
            f"the tokenizers of {a.label} and {b.label} give different tokens for the rows, and a"
            " mixture of the two models has none"
        )
    return ours, _note_on_configs(a, b)


def _note_on_configs(a: ModelSource, b: ModelSource) -> str | None:
    """A note on the settings that differ between the ends, of which the path has those of `a`."""
    from transformers import AutoConfig

    ours, theirs = (
        AutoConfig.from_pretrained(source.folder, local_files_only=True).to_dict()
        for source in (a, b)
    )
    differing = [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if key not in _IGNORED_SETTINGS and ours.get(key) != theirs.get(key)
    ]
    if not differing:
        return None
    return (
        f"the configs differ in {', '.join(differing)}; the path has {a.label}'s, so the loss at"
        f" t = 1 is not that of {b.label} as it is"
    )


def _summarise(
    ends: tuple[str, str],
    control: bool,
    ts: Sequence[float],
    measured: Sequence[_Measured],
    seed: int,
    note: str | None,
) -> MeasuredPath:
    import numpy as np

    counts = measured[0][0].counts
    points = [
        PathPoint(
            t,
            *mean_loss(losses.sums, counts),
            accuracy=float(losses.right.sum() / counts.sum()),
            scores=scores,
        )
        for t, (losses, scores) in zip(ts, measured, strict=True)
    ]
    sums = np.stack([losses.sums for losses, _ in measured])
    found = find_barrier(ts, sums, counts, seed=seed)
    return MeasuredPath(
        ends=ends,
        control=control,
        points=tuple(points),
        barrier=found.barrier,
        interval=found.interval,
        rows=len(counts),
        tokens=int(counts.sum()),
        note=note,
    )


def _finite(value: Any) -> Any:
    """JSON values, with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
