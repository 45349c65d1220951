"""Grafts and points of a path as transformers models, for Python and notebooks."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING

from diffxfer.models.checkpoint import checkpoint_source
from diffxfer.models.graft import graft_source
from diffxfer.models.loading import LoadedModel, load
from diffxfer.models.path import check_t, path_source
from diffxfer.models.source import ModelSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch


def load_graft(
    diff: Path | str,
    target: Path | str,
    *,
    alpha: float = 1.0,
    alpha_for: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    added: str = "refuse",
    rename: Sequence[str] = (),
    vocab: str = "auto",
    out_dtype: str | None = None,
    allow_nonfinite: bool = False,
    allow_unrelated: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a graft, target + α·Δ, as a transformers model; its weights are not written to disk.

    The model has the weights, the tokenizer and the generation settings that `apply_diff` would
    write. The memory that is needed is the model and a tensor.

    Args:
        diff: a diff vector or a LoRA adapter: a folder, or one on the Hub, ``"org/name"`` or
            ``"org/name@revision"``.
        target: the checkpoint to graft onto, named the same way.
        alpha: the scale of Δ; 0 gives the target.
        alpha_for: scales by pattern of the target's tensor names; the last match wins.
        include: graft only tensors whose names match one of these patterns; copy the others.
        exclude: copy tensors whose names match one of these patterns.
        allow_missing: tensors that a role may lack: the target's are copied, others dropped.
        added: what to do with a head that fine-tuning added: ``"bring"`` it whole, ``"drop"`` it,
            or ``"refuse"``.
        rename: ``"ROLE:REGEX=TEXT"``, new names under which a role's tensors are paired.
        vocab: how rows of tokens pair: ``"ids"``, ``"tokens"``, or ``"auto"`` to decide.
        out_dtype: the dtype that `apply_diff` would write; None for that of the target's tensors.
        allow_nonfinite: let NaN, infinity and overflow through.
        allow_unrelated: graft even if base and target are unrelated.
        dtype: the dtype in memory; None for that of the config.
        device: where the model is placed; None for the CPU.
        attn_implementation: as for `from_pretrained`, such as ``"eager"``.
        threads: number of threads that compute; None for one per processor.
        progress: called with the bytes done and the total bytes.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        DiffxferError: for every known failure.

    Example:
        >>> model, tokenizer = load_graft("sft-diff", "llama-3.1")  # doctest: +SKIP
    """
    with graft_source(
        diff,
        target,
        alpha,
        alpha_for=alpha_for,
        include=include,
        exclude=exclude,
        allow_missing=allow_missing,
        added=added,
        rename=rename,
        vocab=vocab,
        out_dtype=out_dtype,
        allow_nonfinite=allow_nonfinite,
        allow_unrelated=allow_unrelated,
        threads=threads,
        progress=progress,
    ) as source:
        for text in source.warnings:
            warnings.warn(text, stacklevel=2)
        return load(
            source,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            progress=progress,
        )


def load_path(
    a: Path | str | ModelSource,
    b: Path | str | ModelSource,
    t: float,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a point of the straight path between two models, (1 − t)·a + t·b.

    The weights are mixed in float64 and rounded once to the dtype of `a`. Nothing is written to
    disk.

    Args:
        a: where the path begins: a folder, a model on the Hub, ``"org/name"`` or
            ``"org/name@revision"``, or a source such as `graft_source` gives. Its config and
            tokenizer are those of the result.
        b: where the path ends, given the same way.
        t: how far along the path, from 0 to 1.
        dtype: the dtype in memory; None for that of the config.
        device: where the model is placed; None for the CPU.
        attn_implementation: as for `from_pretrained`, such as ``"eager"``.
        progress: called with the bytes done and the total bytes.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        OptionError: if `t` is not from 0 to 1.
        DiffxferError: for every other known failure.

    Example:
        >>> middle = load_path("llama-3.0", "llama-3.1", 0.5).model  # doctest: +SKIP
    """
    check_t(t)
    with ExitStack() as stack:
        # A source that the caller made stays open.
        start, end = (
            one
            if isinstance(one, ModelSource)
            else stack.enter_context(checkpoint_source(one, progress=progress))
            for one in (a, b)
        )
        return load(
            path_source(start, end, t),
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            progress=progress,
        )
