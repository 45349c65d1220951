"""From a source of Δ and a target to the published graft."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from diffxfer.diffs.companions.inherit import inherit_companions
from diffxfer.diffs.delta.from_checkpoints import source_entry
from diffxfer.diffs.extraction.extract_tasks import compare
from diffxfer.diffs.grafting.give_back import copy_finetuned, give_back, target_is_base
from diffxfer.diffs.grafting.pairing import (
    choose_added,
    count_tied_head,
    match_output,
    names_to_choose,
    other_fates,
)
from diffxfer.diffs.grafting.requantization import (
    expected_losses,
    note_of_decoding,
    requantized_tasks,
    stored_errors,
    warnings_of_errors,
)
from diffxfer.diffs.grafting.tasks import graft_tasks, whole_model
from diffxfer.diffs.jobs.job import Job, do, nothing_more
from diffxfer.diffs.matching.role import notes_of_names
from diffxfer.diffs.relations.kinship import (
    kinship_of_graft,
    warning_of_digests,
    without_digests,
)
from diffxfer.diffs.soundness.check import check_result, check_roles
from diffxfer.diffs.vocab.relate import relate_to_target
from diffxfer.diffs.vocab.tokens import read_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.artifact.manifest import Manifest, TensorEntry
    from diffxfer.diffs.companions.inherit import Inheritance
    from diffxfer.diffs.delta.from_checkpoints import Source
    from diffxfer.diffs.grafting.options import GraftOptions
    from diffxfer.diffs.grafting.pairing import Output
    from diffxfer.diffs.jobs.job import Finish
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.diffs.matching.match import Difference
    from diffxfer.diffs.matching.role import Role
    from diffxfer.diffs.relations.kinship import Kinship
    from diffxfer.diffs.vocab.pair_target import TargetPairing
    from diffxfer.streaming.plan import TensorTask
    from diffxfer.streaming.statistics import TensorResult


@dataclass(frozen=True, slots=True)
class PlannedGraft:
    """A graft that is matched and checked, but not made.

    Attributes:
        job: the work.
        kinship: how the roles relate.
        options: the options.
    """

    job: Job
    kinship: Kinship
    options: GraftOptions

    def make(self) -> Report:
        """Compute and publish it.

        Raises:
            DiffxferError: for every known failure.
        """
        return do(self.job, self.options.run)


def plan_graft(
    source: Source,
    roles: Sequence[Role],
    out: Path,
    options: GraftOptions,
    labels: Mapping[str, str],
    diff: tuple[Path, Manifest] | None,
    warnings: Sequence[str] = (),
    *,
    is_related: bool = False,
) -> PlannedGraft:
    """Match and check a graft.

    Args:
        source: the source of Δ.
        roles: the roles whose files are checked: the target, after finetuned and base if Δ comes
            from two checkpoints.
        out: the folder to create.
        options: the options.
        labels: the target's names of other roles' tensors.
        diff: the diff vector's folder and manifest, if Δ comes from one.
        warnings: what a user should know already.
        is_related: leave out the comparison of base with target.

    Returns:
        The graft, with its problems if tensors cannot be matched.

    Raises:
        DiffxferError: for every other known failure.
    """
    role, selection = roles[-1], options.selection
    target = role.checkpoint
    selection.refuse_unused(names_to_choose(source, role, labels))
    if diff is not None:
        choose_added(source, options.added, selection, labels)
    output = match_output(source, role, selection, options.added)
    match = output.match
    warnings = [*warnings, *count_tied_head(match, output.head, selection)]
    pairing, more = _pair_tokens(source, output, options)
    problems = [*source.match.problems, *match.problems]
    tasks: list[TensorTask] = []
    vocab_size: int | None = None
    if not problems:
        warnings += check_roles(*(r.checkpoint for r in roles), graft=True)
        tasks, vocab_size = graft_tasks(source, output, pairing, selection, options.dtype)
    scaled = () if problems or is_related else match.scaled(selection)
    kinship = kinship_of_graft(scaled, diff, allow_unrelated=options.allow_unrelated)
    companions = _companions(source, target, pairing, vocab_size, options)
    made, lost = _written(tasks, output, options, diff)
    made, kinship = _on_base(made, kinship, scaled, roles, diff, options)
    tasks = [*(compare(*pair) for pair in source.match.integers), *kinship.tasks, *made]
    said = [*warnings, *lost, *kinship.warnings, *source.vocabulary.warnings, *more]
    said += [*companions.warnings, *check_result(companions.files, tasks)]
    job = _job(source, output, out, options, tasks, companions, pairing, _finish_of(kinship, said))
    job.problems, job.warnings, job.relations = problems, said, kinship.relations
    job.notes = [*notes_of_names(roles), *_notes_of_format(target, options)]
    job.observe = partial(_observe_errors, job) if options.requantize else None
    return PlannedGraft(job, kinship, options)


def _on_base(
    made: list[TensorTask],
    kinship: Kinship,
    pairs: Sequence[tuple[Difference, StoredTensor]],
    roles: Sequence[Role],
    diff: tuple[Path, Manifest] | None,
    options: GraftOptions,
) -> tuple[list[TensorTask], Kinship]:
    """The tasks if the target is base itself: they give finetuned back bit for bit."""
    if diff is not None:
        if target_is_base(pairs, diff[1], options.run):
            return give_back(made, diff[1]), without_digests(kinship)
        return made, kinship
    files = [role.checkpoint.weights.shards for role in roles[1:]]
    is_base = len(files) > 1 and files[0] == files[1]
    return (copy_finetuned(made) if is_base else made), kinship


def _pair_tokens(
    source: Source, output: Output, options: GraftOptions
) -> tuple[TargetPairing | None, Sequence[str]]:
    """How rows of tokens pair with the target's, and warnings."""
    return relate_to_target(
        source.vocabulary,
        read_tokenizer(output.role.checkpoint.folder),
        options.vocab,
        same_rows=all(ours.shape == theirs.shape for ours, theirs in output.match.grafts),
    )


def _notes_of_format(target: Checkpoint, options: GraftOptions) -> list[str]:
    """A note if a quantised target is decoded, and the user has not said how."""
    return [] if options.requantize or options.dtype else note_of_decoding(target)


def _written(
    tasks: Sequence[TensorTask],
    output: Output,
    options: GraftOptions,
    diff: tuple[Path, Manifest] | None,
) -> tuple[list[TensorTask], list[str]]:
    """The tasks of all tensors that are written, and warnings of what their format will lose."""
    made = whole_model(tasks, output, options.dtype)
    if not options.requantize:
        return made, []
    made = requantized_tasks(made, output)
    if diff is None or not options.run.dry_run:
        return made, []
    return made, expected_losses(output.match.grafts, diff[1], options.selection.alpha_of)


def _observe_errors(job: Job, silent: Mapping[str, TensorResult]) -> None:
    """Keep the errors of tensors that were quantised anew, and warn of large ones."""
    job.requantized += stored_errors(silent)
    job.warnings += warnings_of_errors(job.requantized)


def _job(
    source: Source,
    output: Output,
    out: Path,
    options: GraftOptions,
    tasks: list[TensorTask],
    companions: Inheritance,
    pairing: TargetPairing | None,
    finish: Finish,
) -> Job:
    target = output.role.checkpoint
    return Job(
        verb=source.operation.value,
        out=out,
        tasks=tasks,
        inputs=(*source.shards, *target.weights.shards),
        indexed=target.weights.indexed and options.run.max_shard_bytes is None,
        files=dict(companions.files),
        command=options.command,
        sources={**source.entries, "target": source_entry(target.weights)},
        fates=[*output.match.fates, *source.match.fates, *other_fates(source, output.role)],
        problems=[],
        finish=finish,
        vocabulary=pairing.mode if pairing else "rows",
        added_tokens=tuple(pairing.names.values()) if pairing else (),
        dropped_tokens=pairing.dropped if pairing else (),
        left_out=companions.left_out,
        began=options.began,
    )


def _finish_of(kinship: Kinship, warnings: list[str]) -> Finish:
    """Append a warning if the digests show that the target is the base itself."""

    def finish(
        manifest: Manifest, results: Mapping[str, TensorResult], silent: Mapping[str, str]
    ) -> tuple[Manifest, Iterable[tuple[str, TensorEntry]], dict[str, bytes]]:
        warnings.append(warning_of_digests(kinship, silent))
        return nothing_more(manifest, results, silent)

    return finish if kinship.tasks else nothing_more


def _companions(
    source: Source,
    target: Checkpoint,
    pairing: TargetPairing | None,
    vocab_size: int | None,
    options: GraftOptions,
) -> Inheritance:
    return inherit_companions(
        target.folder,
        source.behaviour,
        translate=pairing.translate if pairing else None,
        additions=pairing.names if pairing else {},
        added_source=pairing.additions if pairing else {},
        renamed=pairing.renamed if pairing else {},
        vocab_size=vocab_size,
        dtype=options.out_dtype,
        head=bool(source.match.added),
        decoded=bool(target.weights.formats) and not options.requantize,
    )
