"""The options of a graft, checked before anything is read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from diffxfer.diffs.extraction.extract import DTYPES
from diffxfer.diffs.jobs.job import RunOptions
from diffxfer.diffs.jobs.shards import parse_size
from diffxfer.diffs.matching.added import check_added
from diffxfer.diffs.matching.rename import Rename, names_command, parse_renames
from diffxfer.diffs.matching.selection import Selection, make_selection
from diffxfer.diffs.vocab.pair_base import check_mode
from diffxfer.errors import OptionError
from diffxfer.streaming.run import check_run_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.streaming.distribute import Cluster


@dataclass(frozen=True, slots=True)
class GraftOptions:
    """The options that `apply_diff` and `transfer` share, checked.

    Attributes:
        selection: which tensors take part, and their scales.
        added: what to do with a head that fine-tuning added.
        renames: new names under which a role's tensors are paired.
        vocab: how rows of tokens pair.
        out_dtype: the output's dtype, None for the target's.
        allow_unrelated: graft even if base and target are unrelated.
        command: the options that affect the result, for manifest and card.
        run: the other options.
        began: the `time.perf_counter` reading when the verb was called.
        requantize: write encoded tensors of the target in their encoding.
    """

    selection: Selection
    added: str
    renames: tuple[Rename, ...]
    vocab: str
    out_dtype: str | None
    allow_unrelated: bool
    command: dict[str, str | float | list[str] | dict[str, float]]
    run: RunOptions
    began: float
    requantize: bool = False

    @property
    def dtype(self) -> str | None:
        """The output's dtype, as safetensors names it; None for the target's."""
        return DTYPES.get(self.out_dtype or "")


def check_options(
    alpha: float,
    alpha_for: Mapping[str, float] | None,
    include: Sequence[str],
    exclude: Sequence[str],
    allow_missing: Sequence[str],
    added: str,
    rename: Sequence[str],
    vocab: str,
    out_dtype: str | None,
    max_shard_size: str | None,
    threads: int | None,
    device: str,
    device_memory: str,
    allow_nonfinite: bool,
    allow_unrelated: bool,
    overwrite: bool,
    restart: bool,
    stream: bool,
    dry_run: bool,
    progress: Callable[[int, int], None] | None,
    roles: Sequence[str],
    requantize: bool = False,
    cluster: Cluster | None = None,
) -> GraftOptions:
    """Check the arguments of `apply_diff` or `transfer`; `rename` may name only `roles`.

    Raises:
        OptionError: if a value is invalid.
    """
    began = time.perf_counter()
    _check_format(out_dtype, requantize, allow_nonfinite=allow_nonfinite)
    check_mode(vocab)
    check_added(added)
    renames = parse_renames(rename, roles)
    chosen = {"include": include, "exclude": exclude, "allow_missing": allow_missing}
    selection = make_selection(alpha=alpha, alpha_for=alpha_for, **chosen)
    command: dict[str, str | float | list[str] | dict[str, float]] = {
        "alpha": float(alpha),
        "alpha_for": {regex: float(scale) for regex, scale in (alpha_for or {}).items()},
        **selection.command(),
        **names_command(added, renames),
        "vocab": vocab,
        "out_dtype": out_dtype or "target",
        "max_shard_size": max_shard_size or "target",
        "allow_nonfinite": str(allow_nonfinite).lower(),
        **({"requantize": "true"} if requantize else {}),
    }
    max_shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    check_run_options(threads, device, cluster)
    memory = parse_size(device_memory, "--device-memory")
    run = RunOptions(
        *(threads, device, memory, allow_nonfinite, max_shard_bytes, overwrite, restart, dry_run),
        *(progress, stream, cluster),
    )
    return GraftOptions(
        *(selection, added, renames, vocab, out_dtype, allow_unrelated, command, run, began),
        requantize,
    )


def _check_format(out_dtype: str | None, requantize: bool, *, allow_nonfinite: bool) -> None:
    if out_dtype is not None and out_dtype not in DTYPES:
        problem = f"{out_dtype!r} is unknown"
        raise OptionError("--out-dtype", problem, f"use one of {', '.join(DTYPES)}")
    if requantize and allow_nonfinite:
        problem = "NaN and infinity have no code in most quantised formats"
        raise OptionError("--requantize", problem, "leave out --allow-nonfinite or --requantize")


class WeightOptions(TypedDict, total=False):
    """The options of a graft in memory besides alpha, as `apply_diff` takes them."""

    alpha_for: Mapping[str, float] | None
    include: Sequence[str]
    exclude: Sequence[str]
    allow_missing: Sequence[str]
    added: str
    rename: Sequence[str]
    vocab: str
    out_dtype: str | None
    allow_nonfinite: bool
    allow_unrelated: bool
    threads: int | None
    progress: Callable[[int, int], None] | None


def check_weight_options(
    alpha: float, options: WeightOptions, roles: Sequence[str]
) -> GraftOptions:
    """Check the options of a graft in memory.

    Args:
        alpha: the scale of Δ.
        options: the other options; those left out have the defaults of `apply_diff`.
        roles: the roles that `rename` may name.

    Raises:
        OptionError: if a value is invalid.
    """
    return check_options(
        alpha,
        options.get("alpha_for"),
        options.get("include", ()),
        options.get("exclude", ()),
        options.get("allow_missing", ()),
        options.get("added", "refuse"),
        options.get("rename", ()),
        options.get("vocab", "auto"),
        options.get("out_dtype"),
        None,
        options.get("threads"),
        "cpu",
        "512MB",
        options.get("allow_nonfinite", False),
        options.get("allow_unrelated", False),
        False,
        False,
        False,
        False,
        options.get("progress"),
        roles,
    )
