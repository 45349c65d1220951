"""The files of a model on the Hub: downloads the small files and lists the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile

from diffxfer.checkpoints.companions import (
    MAX_COMPANION_BYTES,
    README,
    companion_path,
    is_companion,
    optional_object,
)
from diffxfer.checkpoints.foreign import refuse_foreign
from diffxfer.checkpoints.hub.download import download
from diffxfer.checkpoints.hub.failures import AT_FIRST_S, not_cached, page_of, persistently
from diffxfer.checkpoints.hub.repo_ids import HubFile, HubId, is_inside
from diffxfer.checkpoints.location import Place
from diffxfer.checkpoints.output_place import MANIFEST_NAME
from diffxfer.checkpoints.shard_index import SHARD_NAMES, read_index
from diffxfer.errors import CompanionError, HubError

if TYPE_CHECKING:
    from collections.abc import Iterable

_INDEXES = tuple(names.index for names in SHARD_NAMES)

_ADAPTER, _FACTORS = "adapter_config.json", "adapter_model.safetensors"
"""The config and the weights of an adapter."""

_MARKS = ("config.json", MANIFEST_NAME, _ADAPTER)
"""Every model, diff vector and adapter has one of these."""


def open_snapshot(model: HubId) -> tuple[Path, dict[str, HubFile] | None]:
    """Find a model on the Hub, and download all its files but the weights into the Hub's cache.

    Args:
        model: the model, at any revision.

    Returns:
        Its folder in the cache, named after the commit; and its files on the Hub by name, or None
        if the Hub may not or cannot be asked, so that only the cached folder is available.

    Raises:
        HubError: if it cannot be fetched, or is no model, diff vector or adapter.
        CheckpointError: if it is a model in an unsupported format.
        CompanionError: if a file that should be small is not.
    """
    api = HfApi(library_name="diffxfer")
    if constants.is_offline_mode():
        return _cached(model, _resolve(api, model, here=True)), None
    try:
        # A separate request: listing files would wait half a minute without a network.
        persistently(lambda: api.model_info(model.repo, revision=model.revision), model, AT_FIRST_S)
        commit = _resolve(api, model)
        files = _list(api, model, commit)
    except HubError as exc:
        if exc.reason not in ("connection", "server"):
            raise
        try:
            return _cached(model, _resolve(api, model, here=True)), None
        except HubError:
            raise exc from None
    folder = _folder(model.repo, commit)
    if not any(name in files for name in _MARKS):
        refuse_foreign(Place(folder, files))
        problem = f"has no config.json at {commit[:8]}, so it is not a model"
        remedy = f"see {page_of(model.repo)}"
        raise HubError(model.repo, model.revision, "content", problem, remedy)
    _bring(files, [MANIFEST_NAME])
    _bring(files, _companions(folder, files))
    return folder, files


def _resolve(api: HfApi, model: HubId, *, here: bool = False) -> str:
    """The commit of a revision; from the cache only if `here` is set."""
    repo, revision = model.repo, model.revision
    found = persistently(
        lambda: api.resolve_revision(repo, revision=revision, local_files_only=here),
        model,
        AT_FIRST_S,
    )
    commit: str = found.resolved
    return commit


def _folder(repo: str, commit: str) -> Path:
    """The cache folder of a commit."""
    home = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return home / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots" / commit


def _list(api: HfApi, model: HubId, commit: str) -> dict[str, HubFile]:
    """Every file of a commit by name."""
    folder = _folder(model.repo, commit)
    entries = persistently(
        lambda: list(api.list_repo_tree(model.repo, recursive=True, revision=commit)), model, ()
    )
    return {
        entry.path: HubFile(
            repo=model.repo,
            commit=commit,
            name=entry.path,
            size=entry.size,
            etag=entry.blob_id if entry.lfs is None else entry.lfs.sha256,
            path=folder / entry.path,
        )
        for entry in entries
        if isinstance(entry, RepoFile) and is_inside(entry.path)
    }


def _bring(files: dict[str, HubFile], names: Iterable[str]) -> None:
    """Download the named files that the model has and the cache does not."""
    wanted = [files[name] for name in names if name in files and not files[name].here]
    for file in wanted:
        if file.size > MAX_COMPANION_BYTES:
            raise CompanionError(
                file.path,
                f"has {file.size} bytes on the Hub, but a companion has at most"
                f" {MAX_COMPANION_BYTES}",
                "report it to the owner of the repository",
            )
    download(wanted)


def _companions(folder: Path, files: dict[str, HubFile]) -> list[str]:
    """The files needed besides the shards; for a diff vector, those that its manifest names."""
    # The README states the licence.
    others = (*_INDEXES, README, _ADAPTER)
    names = [name for name in files if is_companion(name) or name in others]
    described = optional_object(folder, MANIFEST_NAME)
    beside = described.get("files")
    if described.get("kind") == "diff" and isinstance(beside, dict):
        names += beside
    return list(dict.fromkeys(names))


def _cached(model: HubId, commit: str) -> Path:
    """The cache folder of a commit, if it has all the files that are needed."""
    marks = (try_to_load_from_cache(model.repo, name, revision=commit) for name in _MARKS)
    mark = next((path for path in marks if isinstance(path, str)), None)
    if mark is None:
        raise not_cached(model)
    folder = Path(mark).parent
    like = Place(folder).shard_names
    if like is None and (folder / _ADAPTER).exists():
        names = [_FACTORS]
    else:
        like = like or SHARD_NAMES[0]
        index = companion_path(folder, like.index)
        names = [like.single] if index is None else sorted(read_index(index))
    for name in names:
        if not (folder / name).exists():
            raise not_cached(model, name)
    return folder
