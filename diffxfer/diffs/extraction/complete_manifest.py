"""The manifest of a diff vector: what extraction measured of each tensor, ties and tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffxfer.diffs.artifact.manifest import TensorEntry, TokensEntry
from diffxfer.diffs.artifact.samples import SAMPLES_NAME, samples_file
from diffxfer.diffs.extraction.extract_tasks import BASE_ONLY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from diffxfer.diffs.artifact.manifest import Manifest
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.jobs.job import Finish
    from diffxfer.streaming.statistics import TensorResult


def complete_manifest(source: Source, diff_dtype: str) -> Finish:
    """What adds the fields of the manifest that only a diff vector has.

    Args:
        source: finetuned and base.
        diff_dtype: the dtype of the diff vector, as the user gave it.
    """

    def finish(
        manifest: Manifest, results: Mapping[str, TensorResult], silent: Mapping[str, str]
    ) -> tuple[Manifest, Iterable[tuple[str, TensorEntry]], dict[str, bytes]]:
        whole = frozenset(spec.name for spec in source.match.added)
        tensors = (
            (
                name,
                TensorEntry(result.checksum)
                if name in whole
                else _entry(result, silent.get(BASE_ONLY + name)),
            )
            for name, result in results.items()
        )
        added = {
            "dtype": diff_dtype,
            "tied": {role: state.value for role, state in source.heads.items()},
            "tokens": _tokens(source),
            "kept": sorted(source.match.kept),
            "left_out": sorted((*source.match.left_out, *source.match.unchanged)),
            "added_tensors": sorted(whole),
            "is_part": source.match.is_part or None,
        }
        samples = samples_file(result.packed_samples for result in results.values())
        return manifest.model_copy(update=added), tensors, {SAMPLES_NAME: samples}

    return finish


def _entry(result: TensorResult, base_checksum: str | None) -> TensorEntry:
    norms = result.delta_norm, result.base_norm
    delta_norm, base_norm = (norm if math.isfinite(norm) else None for norm in norms)
    return TensorEntry(
        checksum=result.checksum,
        delta_norm=delta_norm,
        base_norm=base_norm,
        base_checksum=base_checksum or result.input_checksum,
        inexact=result.inexact,
        samples=len(result.samples),
        unchanged=result.unchanged,
    )


def _tokens(source: Source) -> TokensEntry | None:
    vocabulary = source.vocabulary
    if vocabulary.tokenizer is None or vocabulary.base_pairing is None:
        return None
    return TokensEntry(
        finetuned=vocabulary.tokenizer.fingerprint,
        base=vocabulary.base_fingerprint,
        pairing=vocabulary.base_pairing.mode,
        added=dict(vocabulary.added),
        renamed=dict(vocabulary.renamed),
    )
