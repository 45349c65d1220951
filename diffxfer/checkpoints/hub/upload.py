"""Writing to a repository on the Hub: uploading changed files in a single commit.

The commit comes last, so a repository never looks complete when it is not. The Hub recognises
files that were uploaded before an interruption by their content; they are not uploaded again.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from diffxfer.checkpoints.hub.failures import AT_FIRST_S, with_retries
from diffxfer.checkpoints.hub.refusals import explain_refusal, no_token, refuse_offline, root_of
from diffxfer.errors import HubError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_T = TypeVar("_T")
_BLOCK = 1 << 20

Files: TypeAlias = "Mapping[str, bytes | Path]"
"""The files to upload by name, each as bytes or as a path."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file in a repository.

    Attributes:
        size: in bytes.
        hash: SHA-256 if it is large, else git's blob id.
        large: whether it is stored outside git.
    """

    size: int
    hash: str
    large: bool


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository at its latest commit.

    Attributes:
        repo: ``org/name``.
        commit: the latest commit.
        private: whether it is visible only to those who may read it.
        files: its files by name.
    """

    repo: str
    commit: str
    private: bool
    files: Mapping[str, Stored]


def may_ask() -> bool:
    """Whether somebody is logged in, and the Hub may be asked."""
    return get_token() is not None and not constants.is_offline_mode()


def require_login(repo: str) -> None:
    """Refuse to go on if the Hub cannot be written to.

    Args:
        repo: the repository to write to.

    Raises:
        HubError: if nobody is logged in, or offline mode is set.
    """
    refuse_offline(repo)
    if get_token() is None:
        raise no_token(repo)


def open_repository(repo: str) -> Repository | None:
    """The repository of that name, None if there is none.

    Args:
        repo: ``org/name``.

    Raises:
        HubError: if the Hub cannot be asked.
    """

    def look() -> Repository | None:
        api = _api()
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError as exc:
            if exc.response.status_code == 401 and get_token() is not None:
                raise  # the token is invalid; the repository may exist
            return None
        assert info.sha is not None, "the Hub states it where it is not told what to state"
        entries = api.list_repo_tree(repo, recursive=True, revision=info.sha)
        files = {
            entry.path: Stored(
                size=entry.size,
                hash=entry.blob_id if entry.lfs is None else entry.lfs.sha256,
                large=entry.lfs is not None,
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }
        return Repository(repo, info.sha, bool(info.private), files)

    return _persistently(look, repo)


def read_stored(repository: Repository, name: str) -> Path:
    """Download a file of a repository into the Hub's cache.

    Args:
        repository: the repository.
        name: the file.

    Raises:
        HubError: if it cannot be downloaded.
    """
    repo, commit = repository.repo, repository.commit
    return Path(_persistently(lambda: hf_hub_download(repo, name, revision=commit), repo))


def changed_files(files: Files, repository: Repository | None) -> list[str]:
    """The names of files that a repository lacks or has with different content.

    Only files of equal size are read.

    Args:
        files: the files to upload.
        repository: the repository, or None.
    """
    stored = {} if repository is None else repository.files
    return [
        name
        for name, content in files.items()
        if name not in stored or not _is_same(content, stored[name])
    ]


def _is_same(content: bytes | Path, stored: Stored) -> bool:
    if size_of(content) != stored.size:
        return False
    digest = hashlib.sha256() if stored.large else hashlib.sha1(b"blob %d\0" % stored.size)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest() == stored.hash


def size_of(content: bytes | Path) -> int:
    """The size of a file in bytes.

    Args:
        content: its bytes, or its path.
    """
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def check_card(repo: str, card: bytes) -> None:
    """Refuse a card that the Hub does not accept, before a repository is created for it.

    Args:
        repo: the repository for it.
        card: the README.

    Raises:
        HubError: if it is not accepted.
    """

    def ask() -> None:
        answer = get_session().post(
            f"{constants.ENDPOINT}/api/validate-yaml",
            json={"repoType": "model", "content": card.decode()},
            headers=build_hf_headers(library_name="diffxfer"),
        )
        if answer.status_code == 400:
            found = [str(error.get("message")) for error in answer.json().get("errors", ())]
            raise ValueError(f"its README.md is invalid: {'; '.join(found)}")
        hf_raise_for_status(answer)

    _persistently(ask, repo)


def create_repository(repo: str, *, private: bool) -> Repository:
    """Create a repository.

    Args:
        repo: ``org/name``.
        private: whether it is private; if False, the owner's settings decide.

    Raises:
        HubError: if it cannot be created.
    """
    _persistently(lambda: _api().create_repo(repo, private=private or None, exist_ok=True), repo)
    made = open_repository(repo)
    if made is None:
        raise HubError(repo, None, "refused", "was created but does not exist", "see its page")
    return made


def commit_files(
    repository: Repository,
    files: Files,
    removed: Sequence[str],
    message: str,
    *,
    bars: bool,
) -> tuple[Repository, list[str]]:
    """Upload files in one commit.

    Args:
        repository: the repository; the upload fails if somebody else has committed since.
        files: new contents by name.
        removed: names of files to remove.
        message: the commit message.
        bars: show huggingface_hub's progress bars on stderr.

    Returns:
        The repository with that commit, and the Hub's warnings.

    Raises:
        HubError: if the commit was not made.
    """
    repo = repository.repo

    def commit() -> None:
        # Check before a retry: the commit may have been made and only the answer lost.
        now = open_repository(repo)
        done = now is not None and not changed_files(files, now)
        if now is not None and done and not set(removed) & now.files.keys():
            return
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in removed]
        _api().create_commit(
            repo,
            operations=[*additions, *deletions],
            commit_message=message,
            parent_commit=repository.commit,
        )

    with _hushed(bars=bars), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _persistently(commit, repo)
    # UserWarnings are the Hub's remarks on a card; other warnings concern this program.
    remarks = [
        " ".join(str(each.message).split()) for each in caught if each.category is UserWarning
    ]
    return _after(repo, files), list(dict.fromkeys(remarks))


def _after(repo: str, files: Files) -> Repository:
    """The repository after a commit; raises if a `.gitignore` has left files out."""
    now = open_repository(repo)
    stored = {} if now is None else now.files
    for name, content in files.items():
        if name not in stored or stored[name].size != size_of(content):
            problem = f"received {name}, but did not store it"
            remedy = "check whether its .gitignore excludes it, and run the same command again"
            raise HubError(repo, None, "refused", problem, remedy)
    assert now is not None, "something was sent"
    return now


def _api() -> HfApi:
    return HfApi(library_name="diffxfer")


def _persistently(call: Callable[[], _T], repo: str) -> _T:
    """Make a request to the Hub, with retries where they may help."""
    return with_retries(
        call, AT_FIRST_S, lambda exc: explain_refusal(root_of(exc), repo), root=root_of
    )


@contextmanager
def _hushed(*, bars: bool) -> Iterator[None]:
    """Show or hide huggingface_hub's progress bars, and silence its log messages.

    Its messages about retried requests contain the whole link with its signature.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    hide = not bars and not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hide:
            enable_progress_bars()
