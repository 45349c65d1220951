"""Will a graft work, and why: every measurement of three or four models in one report."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from diffxfer.probing.distances import measure_distances
from diffxfer.probing.pair_options import pair_options
from diffxfer.probing.report import ProbeReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def probe(
    finetuned: Path | str,
    base: Path | str,
    target: Path | str,
    *,
    direct: Path | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    added: str = "refuse",
    rename: Sequence[str] = (),
    vocab: str = "auto",
    threads: int | None = None,
    stream: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ProbeReport:
    """Measure what tells whether target + α·(finetuned − base) will work; writes nothing.

    Tensors and rows of tokens pair as in `transfer`, with the same options. Unrelated models are no
    error: a warning says that they are unrelated.

    Args:
        finetuned: the fine-tuned model, or a LoRA adapter: a folder, or ``"org/name[@revision]"``.
        base: the model that finetuned was trained from, named the same way.
        target: the successor of base, named the same way.
        direct: the target's own fine-tune, or an adapter of the target; None if there is none.
        include: measure only tensors whose target name matches one of these patterns.
        exclude: leave out tensors whose target name matches one of these patterns.
        allow_missing: tensors that a model may lack.
        added: what to do with a head that fine-tuning added: ``"bring"`` and ``"drop"`` leave it
            out, ``"refuse"`` makes it an error.
        rename: ``"ROLE:REGEX=TEXT"``, new names under which a model's tensors are paired; the roles
            are finetuned, base, target and direct.
        vocab: how rows of tokens pair: ``"ids"``, ``"tokens"``, or ``"auto"`` to decide.
        threads: number of workers; None for one per processor.
        stream: read models from the Hub without downloading them into its cache.
        progress: called with the bytes done and the total bytes.

    Returns:
        What was measured.

    Raises:
        DiffxferError: if a model is not a sound checkpoint or changes while it is read, or if the
            models do not pair.

    Example:
        >>> probe("llama-3.0-sft", "llama-3.0", "llama-3.1").distances.total.ratio  # doctest: +SKIP
    """
    began = time.perf_counter()
    named = {"finetuned": finetuned, "base": base, "target": target, "direct": direct}
    options = pair_options(
        include=include,
        exclude=exclude,
        allow_missing=allow_missing,
        added=added,
        rename=rename,
        vocab=vocab,
        direct=direct is not None,
    )
    distances = measure_distances(
        *(finetuned, base, target, direct),
        options=options,
        threads=threads,
        stream=stream,
        progress=progress,
    )
    return ProbeReport(
        models={role: str(model) for role, model in named.items() if model is not None},
        distances=distances,
        warnings=distances.warnings,
        elapsed_s=round(time.perf_counter() - began, 3),
    )
