"""Which names are ids of the Hub, where its files may be, and files that are too large."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffxfer.checkpoints.companions import companion_path
from diffxfer.checkpoints.hub.download import refuse_small_cache
from diffxfer.checkpoints.hub.repo_ids import HubFile, HubId, cached_id, read_hub_id, shown_name
from diffxfer.checkpoints.resolve import Place, find, find_id
from diffxfer.errors import CheckpointError, CompanionError, DiskSpaceError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        (Path("org/na.me-2@refs/pr/3"), HubId("org/na.me-2", "refs/pr/3")),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("../name", None),
        ("a/b/c", None),
        ("org/name@", None),
        ("org/name@a b", None),
        ("org/name@../../etc", None),
        ("org/name@-f", None),
        ("org/name@/main", None),
        ("org/name@main/", None),
        ("org/name@a^", None),
        ("org/name@a.lock", None),
        ("org/name@\x1b[31m", None),
        (".hidden/name", None),
    ],
)
def test_ids(named: str | Path, found: HubId | None) -> None:
    assert read_hub_id(named) == found
    assert found is None or str(found) == str(named)


def test_a_folder_is_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/a-name").mkdir(parents=True)
    assert find("org/a-name", "a model") == Place(Path("org/a-name"))
    Path("org/file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        find("org/file", "a model")
    said = r"did you mean org/a-name\? For the model on the Hub, give org/a-nmae@main$"
    with pytest.raises(CheckpointError, match=said):
        find("org/a-nmae", "a model")
    assert find_id("org/a-nmae", "a model") is None
    assert find_id("org/a-nmae@main", "a model") == HubId("org/a-nmae", "main")
    assert find_id("org/another", "a model") == HubId("org/another")
    with pytest.raises(CheckpointError, match=r"cannot be opened \(File name too long\)"):
        find_id(f"org/{'a' * 300}", "a model")


def test_a_snapshot_is_known_by_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--na-me" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert cached_id(folder) == HubId("org/na-me", COMMIT)
    assert shown_name(folder) == "org/na-me"
    assert cached_id(folder.parent) is None
    assert shown_name(tmp_path / "mine") == "mine"


def test_companions_may_lie_in_the_blobs_that_all_repositories_share(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / COMMIT
    shared = tmp_path / "blobs" / "ab" / "abcd"
    own = tmp_path / "models--org--name" / "blobs" / "etag"
    for path in (folder, shared.parent, own.parent):
        path.mkdir(parents=True)
    shared.write_bytes(b"{}")
    own.symlink_to(shared)
    (folder / "tokenizer.json").symlink_to(own)
    assert companion_path(folder, "tokenizer.json") == folder / "tokenizer.json"
    (tmp_path / "key").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "key")
    with pytest.raises(CompanionError, match="points outside the checkpoint"):
        companion_path(folder, "LICENSE")


def test_downloads_that_have_no_room_are_refused(tmp_path: Path) -> None:
    large = HubFile("org/name", COMMIT, "a.safetensors", 1 << 60, "ab" * 20, tmp_path / "a")
    with pytest.raises(DiskSpaceError, match=r"the downloads.* need .* set HF_HOME.* --stream"):
        refuse_small_cache([large], tmp_path / "out", 1)
    with pytest.raises(DiskSpaceError, match=r"set HF_HOME to a folder on a larger disk$"):
        refuse_small_cache([large], None, 0)
