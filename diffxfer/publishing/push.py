"""Publishing a folder on the Hub."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.companions import README
from diffxfer.checkpoints.hub.repo_ids import read_hub_id
from diffxfer.checkpoints.output_place import MANIFEST_NAME
from diffxfer.diffs.artifact.card import brings, license_fields
from diffxfer.diffs.artifact.manifest import FileEntry, Manifest, manifest_bytes
from diffxfer.errors import ArtifactError, OptionError
from diffxfer.publishing.model_card import loaders, write_model_card
from diffxfer.publishing.overwrite_check import KIND_NAMES, refuse_overwrite, stale_files
from diffxfer.publishing.publishable_folder import (
    PublishableFolder,
    open_publishable_folder,
)
from diffxfer.publishing.published_scores import read_published_scores
from diffxfer.publishing.push_report import PushedFile, PushReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.hub.upload import Files, Repository
    from diffxfer.evaluation.scores import TaskScore


def push(
    path: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    message: str | None = None,
    eval: Path | str | None = None,  # noqa: A002 the command's own word
    license: str | None = None,  # noqa: A002 as the Hub calls it
    dry_run: bool = False,
    progress: bool = False,
) -> PushReport:
    """Publish a diff vector, a graft or a tuned model on the Hub, with a complete card.

    Only files in the manifest that the repository lacks are uploaded, in one commit. The folder is
    not changed.

    Args:
        path: a folder that diffxfer wrote.
        repo_id: ``org/name``; the repository is created if necessary.
        private: create a private repository.
        message: the commit message.
        eval: a folder that `evaluate` wrote, with scores of this model for the card.
        license: the id of the licence; None for the one stated by the card of the target.
        dry_run: check everything, but write nothing.
        progress: show progress bars on stderr.

    Returns:
        What was published.

    Raises:
        DiffxferError: for every known failure; then no commit was made.

    Example:
        >>> push("sft-diff", "me/sft-diff", private=True)  # doctest: +SKIP
    """
    began = time.perf_counter()
    repo, folder = _require_id(repo_id), open_publishable_folder(Path(path))
    manifest = folder.manifest
    warnings: list[str] = []
    card = _make_card(folder, repo, Path(path), eval, license, warnings)
    repository = _open_remote(repo, manifest, card, warnings, private=private, dry_run=dry_run)
    changes = _find_changes(_with_card(folder, card), repository)
    said, where = message or f"Upload {KIND_NAMES[manifest.kind]} with diffxfer", repository or repo
    after = repository if dry_run else _commit(changes, where, said, warnings, private, progress)
    return PushReport(
        repo=repo,
        url=_page_url(repo),
        kind=manifest.kind,
        dry_run=dry_run,
        pushed=changes.anything and not dry_run,
        created=repository is None,
        private=private if after is None else after.private,
        commit=None if after is None else after.commit,
        files=changes.fates,
        card=card.decode(),
        use=_usage_line(manifest, repo, folder.config),
        elapsed_s=round(time.perf_counter() - began, 3),
        warnings=tuple(warnings),
    )


def _open_remote(
    repo: str,
    manifest: Manifest,
    card: bytes,
    warnings: list[str],
    *,
    private: bool,
    dry_run: bool,
) -> Repository | None:
    """Open the existing repository, and check that it may be overwritten; None if there is none."""
    from diffxfer.checkpoints.hub import upload

    if dry_run and not upload.may_ask():
        warnings.append("the Hub was not queried: no user is logged in, or HF_HUB_OFFLINE is set")
        return None
    upload.require_login(repo)
    repository = upload.open_repository(repo)
    refuse_overwrite(repository, manifest, private=private)
    if repository is None and not dry_run:
        upload.check_card(repo, card)
    return repository


@dataclass(frozen=True, slots=True)
class _Changes:
    """The changes to a repository.

    Attributes:
        changed: the new and changed files.
        removed: the names of the files of an earlier push to remove.
        fates: the fate of every file.
    """

    changed: Files
    removed: list[str]
    fates: tuple[PushedFile, ...]

    @property
    def anything(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.changed or self.removed)


def _find_changes(files: Files, repository: Repository | None) -> _Changes:
    from diffxfer.checkpoints.hub.upload import changed_files, size_of

    there = {} if repository is None else repository.files
    changed = {name: files[name] for name in changed_files(files, repository)}
    removed = stale_files(repository, files)
    fates = {name: "changed" if name in there else "new" for name in changed}
    kept = [
        PushedFile(name, size_of(content), fates.get(name, "unchanged"))
        for name, content in files.items()
    ]
    gone = [PushedFile(name, 0, "removed") for name in removed]
    return _Changes(changed, removed, (*kept, *gone))


def _commit(
    changes: _Changes,
    where: Repository | str,
    message: str,
    warnings: list[str],
    private: bool,
    progress: bool,
) -> Repository:
    """Create the repository if it is given by name only, and commit the changes if there are any.

    Returns:
        The repository after the commit.
    """
    from diffxfer.checkpoints.hub import upload

    if isinstance(where, str):
        where = upload.create_repository(where, private=private)
    if not changes.anything:
        return where
    after, remarks = upload.commit_files(
        where, changes.changed, changes.removed, message, bars=progress
    )
    warnings += remarks
    return after


def _page_url(repo: str) -> str:
    from diffxfer.checkpoints.hub.failures import page_of

    return page_of(repo)


def _require_id(repo_id: str) -> str:
    found = read_hub_id(repo_id)
    if found is None or found.revision is not None:
        problem = "is not the id of a model on the Hub" if found is None else "names a revision"
        raise OptionError(repo_id, problem, "give a name such as org/name")
    return found.repo


def _make_card(
    found: PublishableFolder,
    repo: str,
    folder: Path,
    scores: Path | str | None,
    license_id: str | None,
    warnings: list[str],
) -> bytes:
    """Make the README to publish, and add warnings about it."""
    manifest = found.manifest
    if scores is not None and manifest.kind == "diff":
        problem = "gives scores, but a diff vector by itself has none"
        raise OptionError("--eval", problem, "give it when you push a graft")
    if found.edited_card is not None:
        if scores is not None or license_id is not None:
            problem = "was edited, so --eval and --license do not change it"
            raise ArtifactError(folder / README, problem, "add them to the file yourself")
        try:
            found.edited_card.decode()
        except UnicodeDecodeError as exc:
            raise ArtifactError(folder / README, "is not UTF-8", "save it as such") from exc
        warnings.append(f"{README} was edited, and is published unchanged")
        return found.edited_card
    if license_id is None and not license_fields(manifest):
        whose = {"graft": "the target", "tuned": "the model", "diff": "finetuned or base"}
        told = f"the card has no licence, since the card of {whose[manifest.kind]} states none"
        warnings.append(f"{told}; see --license")
    results: tuple[TaskScore, ...] = ()
    if scores is not None:
        from diffxfer.evaluation.content_hash import content_hash

        results = read_published_scores(Path(scores), content_hash(folder))
    return write_model_card(repo, manifest, found.config, results, license=license_id)


def _with_card(found: PublishableFolder, card: bytes) -> dict[str, bytes | Path]:
    """All files to publish; the published manifest has the entry of the published card."""
    entry = FileEntry(size=len(card), xxh3=xxhash.xxh3_128_hexdigest(card))
    entries = dict(sorted({**found.manifest.files, README: entry}.items()))
    manifest = found.manifest.model_copy(update={"files": entries, "tensors": {}})
    described = manifest_bytes(manifest, found.manifest.tensors.items())
    return {**found.files, README: card, MANIFEST_NAME: described}


def _usage_line(manifest: Manifest, repo: str, config: Mapping[str, Any]) -> str:
    if manifest.kind == "diff":
        return f"diffxfer apply {repo} TARGET -o OUT{brings(manifest)}"
    return f'{loaders(config)[0]}.from_pretrained("{repo}")'
