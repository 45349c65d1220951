"""A journal gives back what was written, as far as that can be trusted, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

import pytest

from diffxfer.checkpoints import journal as module
from diffxfer.checkpoints.journal import JOURNAL_NAME, Done, Journal, is_journal, summarize
from diffxfer.checkpoints.partial import discard, find_unfinished, is_our_partial
from diffxfer.checkpoints.writer import OutputFolder
from diffxfer.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

JOB, OTHER_JOB = bytes(range(16)), bytes(range(16, 32))
DONE = [Done(3, 100, b"three"), Done(0, 50, b""), Done(7, 25, bytes(range(256)))]


def write(path: Path, *, synced: int | None = None, done: list[Done] = DONE) -> None:
    """A journal of one run; after `synced` of its records, all before was synced."""
    made = Journal(path, JOB, 42)
    made.begin(1000)
    for number, record in enumerate(done):
        if number == synced:
            made.mark(made.size)
        made.add([record])
    made.close()


def read(path: Path) -> list[Done]:
    known = summarize(path)
    assert known is not None
    opened = Journal(path, known.fingerprint, known.inode, known)
    try:
        return list(opened.done())
    finally:
        opened.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / JOURNAL_NAME


def test_it_gives_back_what_was_written(path: Path) -> None:
    write(path)
    known = summarize(path)
    assert known is not None
    assert (known.fingerprint, known.inode) == (JOB, 42)
    assert (known.done_bytes, known.total_bytes) == (175, 1000)
    assert read(path) == DONE


def test_a_torn_end_is_cut_at_the_last_whole_record(path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    sizes = [len(record.payload) + 32 for record in DONE]
    for size in range(len(whole) - sum(sizes), len(whole) + 1):
        path.write_bytes(whole[:size])
        rest, expected = size - (len(whole) - sum(sizes)), []
        for length, record in zip(sizes, DONE, strict=True):
            rest -= length
            if rest >= 0:
                expected.append(record)
        assert read(path) == expected


def test_no_byte_can_be_another(path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        if summarize(path) is not None:
            assert read(path) == DONE[: len(read(path))]
            assert len(read(path)) < len(DONE)


def test_what_comes_after_a_torn_end_replaces_it(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-1] + b"")
    known = summarize(path)
    again = Journal(path, JOB, 42, known)
    again.begin(1000)
    again.add([Done(9, 1, b"nine")])
    again.close()
    assert read(path) == [*DONE[:2], Done(9, 1, b"nine")]


def test_the_records_of_another_journal_are_none(path: Path) -> None:
    write(path)
    ours = path.read_bytes()
    head = 40
    path.unlink()
    Journal(path, OTHER_JOB, 42).close()
    path.write_bytes(path.read_bytes() + ours[head:])
    assert read(path) == []


@pytest.mark.parametrize("synced", [None, 0, 1, 2])
def test_after_another_boot_only_what_was_synced_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch, synced: int | None
) -> None:
    write(path, synced=synced)
    for boot in (b"another", b""):
        monkeypatch.setattr(module, "boot_id", lambda boot=boot: boot)
        assert read(path) == DONE[: synced or 0]
    # What the first run after it takes for granted is still synced for the one after that.
    again = Journal(path, JOB, 42, summarize(path))
    again.begin(1000)
    again.add([Done(9, 1, b"nine")])
    again.close()
    monkeypatch.setattr(module, "boot_id", lambda: b"a third")
    assert read(path) == DONE[: synced or 0]


def test_where_no_boot_is_known_only_what_was_synced_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "boot_id", lambda: b"")
    write(path, synced=2)
    assert read(path) == DONE[:2]


def test_a_sync_covers_what_was_there_when_it_began(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Journal(path, JOB, 42)
    made.begin(1000)
    made.add(DONE[:1])
    covered = made.size
    made.add(DONE[1:])
    made.mark(covered)
    made.close()
    assert read(path) == DONE
    monkeypatch.setattr(module, "boot_id", lambda: b"another")
    assert read(path) == DONE[:1]


def test_a_mark_is_made_durable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Journal(path, JOB, 42)
    made.begin(1000)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    made.mark(made.size)
    made.close()
    assert synced == [path.stat().st_size]


def test_a_sync_that_fails_takes_back_what_came_after_the_last(path: Path) -> None:
    made = Journal(path, JOB, 42)
    made.begin(1000)
    made.add([DONE[0]])
    made.mark(made.size)
    made.add([DONE[1]])
    made.distrust()
    made.close()
    assert read(path) == DONE[:1]


def test_a_journal_that_cannot_be_cut_is_removed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Journal(path, JOB, 42)
    made.begin(1000)
    made.add([DONE[0]])

    def fail(fd: int, size: int) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "ftruncate", fail)
    made.distrust()
    made.close()
    assert not path.exists()


@pytest.mark.parametrize("what", ["nothing", "folder", "fifo", "link", "text", "short"])
def test_what_is_no_journal_is_none(path: Path, what: str) -> None:
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        write(path.with_name("real"))
        path.symlink_to("real")
    elif what == "text":
        path.write_text("not a journal, whatever it is called" * 9)
    elif what == "short":
        write(path)
        os.truncate(path, 39)
    assert summarize(path) is None
    assert is_journal(path) == (what == "short")


# The partial folder that it is in.

HEX = uuid.UUID(int=7).hex


def leave(out: Path, job: str = HEX) -> Path:
    """Leave a folder with progress; its path."""
    with OutputFolder(out, job) as folder:
        folder.write_file("sub/text", b"half")
        folder.journal.begin(1000)
        folder.journal.add([Done(0, 250, b"")])
    return folder.partial


def test_a_folder_with_progress_is_kept_and_found(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    partial = leave(out)
    found = find_unfinished(out)
    assert found is not None
    assert (found.folder, found.percent) == (partial, 25)
    with OutputFolder(out, HEX) as folder:
        assert folder.resumed
        assert [done.number for done in folder.journal.done()] == [0]
        assert folder.held_bytes() > 0
        folder.keep_only(())
        assert [path.name for path in folder.partial.iterdir()] == [JOURNAL_NAME]
        folder.publish()
    assert list(out.parent.iterdir()) == [out]
    assert list(out.iterdir()) == []
    assert find_unfinished(out) is None


def test_progress_of_another_job_is_refused_unless_it_is_to_be_discarded(tmp_path: Path) -> None:
    out, other = tmp_path / "out", uuid.UUID(int=8 << 100).hex
    partial = leave(out)
    with (
        pytest.raises(OutputError, match=r"other inputs or options: 25 % is kept at"),
        OutputFolder(out, other),
    ):
        pytest.fail("the work must not begin")
    assert list(tmp_path.iterdir()) == [partial]
    with OutputFolder(out, other, restart=True) as folder:
        assert not partial.exists()
        assert not folder.resumed
    assert list(tmp_path.iterdir()) == []


def test_the_folder_s_name_alone_does_not_make_it_the_same_job(tmp_path: Path) -> None:
    out, other = tmp_path / "out", uuid.UUID(int=8).hex
    partial = leave(out)
    with OutputFolder(out, other) as folder:
        assert folder.partial == partial
        assert not folder.resumed
        assert [path.name for path in partial.iterdir()] == [JOURNAL_NAME]


@pytest.mark.parametrize("removed", range(3))
def test_a_folder_is_ours_to_the_end_of_its_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    partial = leave(tmp_path / "out")
    for name in ("z.safetensors", "diffxfer.json"):
        (partial / name).write_text('{"diffxfer_format": 1}')
    unlink, done = type(tmp_path).unlink, []

    def stop(path: Path, missing_ok: bool = False) -> None:
        if len(done) == removed:
            raise KeyboardInterrupt
        done.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            discard(partial)
    assert len(done) == removed
    assert is_our_partial(partial)
    discard(partial)
    assert list(tmp_path.iterdir()) == []


BORN = """
import os, pathlib, signal, sys
from diffxfer.checkpoints import journal, writer
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
point = sys.argv[2]
if point == "empty":
    writer.open_journal = die
elif point == "stillborn":
    journal.Journal._write = die
else:
    os.fsync = die
writer.OutputFolder(pathlib.Path(sys.argv[1]), sys.argv[3]).__enter__()
"""


@pytest.mark.parametrize("point", ["empty", "stillborn", "headed"])
@pytest.mark.parametrize("job", [HEX, uuid.UUID(int=8 << 100).hex])
def test_a_run_that_is_killed_as_it_begins_leaves_what_is_ours(
    tmp_path: Path, point: str, job: str
) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", BORN, out, point, HEX], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    with OutputFolder(out, job) as folder:
        folder.publish()
    assert list(tmp_path.iterdir()) == [out]


def test_a_journal_beside_a_folder_that_is_another_is_not_its_own(tmp_path: Path) -> None:
    """As after the exchange: what has the partial folder's name is what OUT was before."""
    out = tmp_path / "out"
    partial = leave(out)
    (partial / JOURNAL_NAME).rename(tmp_path / f"{partial.name}.journal")
    partial.rename(tmp_path / "moved")
    partial.mkdir()
    (partial / "diffxfer.json").write_text('{"diffxfer_format": 1}')
    with OutputFolder(out, HEX) as folder:
        assert not folder.resumed
        folder.publish()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "moved"}


def test_a_journal_beside_its_own_folder_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = leave(out)
    (partial / JOURNAL_NAME).rename(tmp_path / f"{partial.name}.journal")
    with OutputFolder(out, HEX) as folder:
        assert folder.resumed
        folder.publish()
    assert list(tmp_path.iterdir()) == [out]


def test_a_journal_without_a_folder_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = leave(out)
    (partial / JOURNAL_NAME).rename(tmp_path / f"{partial.name}.journal")
    partial.rename(tmp_path / "moved")
    with OutputFolder(out, uuid.UUID(int=8 << 100).hex) as folder:
        folder.publish()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "moved"}
