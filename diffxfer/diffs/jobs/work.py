"""The work of a verb, as data, before it is planned."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from diffxfer.diffs.artifact.manifest import Manifest, SourceEntry, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.stored import ShardFile
    from diffxfer.diffs.jobs.report import StoredError
    from diffxfer.diffs.matching.match import Fate, Problem
    from diffxfer.diffs.relations.relatedness import Relation
    from diffxfer.streaming.plan import TensorTask
    from diffxfer.streaming.statistics import TensorResult

    Finish: TypeAlias = Callable[
        [Manifest, Mapping[str, TensorResult], Mapping[str, str]],
        tuple[Manifest, Iterable[tuple[str, TensorEntry]], dict[str, bytes]],
    ]
    """Completes a manifest from the results by name and the checksums of tensors that were only
    read. Returns the manifest, a lazy iterable of its tensors, and files made from the results."""


def nothing_more(
    manifest: Manifest, results: Mapping[str, TensorResult], silent: Mapping[str, str]
) -> tuple[Manifest, Iterable[tuple[str, TensorEntry]], dict[str, bytes]]:
    """The `Finish` of a job whose manifest records only checksums of its tensors."""
    del silent
    tensors = ((name, TensorEntry(checksum=result.checksum)) for name, result in results.items())
    return manifest, tensors, {}


@dataclass(slots=True)
class Job:
    """The work of a verb, before it is planned.

    Attributes:
        verb: ``"extract"``, ``"apply"``, ``"transfer"`` or ``"tune"``.
        out: the output folder.
        tasks: one per tensor, with the input's shard name; planning empties the list.
        inputs: every file that is read.
        indexed: whether an index is written even for one shard.
        files: companions by name, each as new bytes or as a file to copy.
        command: the options that affect the result, for manifest and card.
        sources: the inputs by role.
        fates: the fate of every tensor.
        problems: tensors that cannot be matched.
        finish: completes the manifest and makes files from the results.
        vocabulary: how rows of tokens were paired.
        added_tokens: tokens that finetuned added.
        dropped_tokens: tokens whose difference is dropped.
        left_out: files that are not copied.
        warnings: likely mistakes, one line each.
        notes: information, one line each.
        began: the `time.perf_counter` reading when the verb was called.
        relations: how the compared models relate.
        identities: the identities of the files to copy, recorded when the job was planned.
        observe: called with the results of tasks that write nothing, before the folder is complete.
        requantized: the errors of tensors that are quantised anew, once they are known.
    """

    verb: str
    out: Path
    tasks: list[TensorTask]
    inputs: Sequence[ShardFile]
    indexed: bool
    files: dict[str, bytes | Path]
    command: dict[str, str | float | list[str] | dict[str, float]]
    sources: Mapping[str, SourceEntry]
    fates: list[Fate]
    problems: list[Problem]
    finish: Finish
    vocabulary: str = "rows"
    added_tokens: tuple[str, ...] = ()
    dropped_tokens: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    relations: tuple[Relation, ...] = ()
    identities: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    observe: Callable[[Mapping[str, TensorResult]], None] | None = None
    requantized: list[StoredError] = field(default_factory=list)
