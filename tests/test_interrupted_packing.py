"""However packing is interrupted, in its first run or its second, the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from diffxfer.checkpoints import journal
from diffxfer.diffs.extraction.spool import SPOOL_NAME, Spool
from diffxfer.streaming import process_output
from tests import tiny
from tests.shim import Faults, compile_shim
from tests.test_interrupted import argv, content, files, finish, make_world, partials

if TYPE_CHECKING:
    from pathlib import Path

    from tests.shim import Ended
    from tests.tiny import World

PACKS = ("exact", "int4")
BLOCKS, CALLS = 28, 167
"""Blocks that are packed, and all calls of pwrite."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def reference(world: World) -> dict[str, dict[str, bytes]]:
    """The results of undisturbed runs, one after the other on one thread."""
    found = {}
    for pack in PACKS:
        out = world.root / f"whole-{pack}" / "out"
        assert tiny.run(*packing(world, out, pack), "--threads", "1").status == 0
        found[pack] = content(out)
    return found


@pytest.fixture
def faults(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Faults:
    return Faults(compile_shim(tmp_path_factory.mktemp("shim")), tmp_path / "log")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "out"


def packing(world: World, out: Path, pack: str = "exact") -> list[str]:
    return argv(world, "extract", out, "--pack", pack)


def go_on(faults: Faults, world: World, out: Path, pack: str) -> tuple[float, float]:
    """Run to the end; returns the shares of the work that was done, and of the models read now."""
    again = faults.run([*packing(world, out, pack), "--json"], under="/family", calls="none")
    assert (again.status, again.err) == (0, "")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    report = json.loads(again.out)
    total = report["bytes_to_read"] + report["bytes_to_write"]
    return report["resumed_bytes"] / total, again.read_bytes / report["bytes_to_read"]


def kill(faults: Faults, world: World, out: Path, pack: str, under: str, at: int) -> Ended:
    calls = "rename" if under == "made" else "pwrite"
    killed = faults.run(packing(world, out, pack), under=under, calls=calls, at=at, do="kill")
    assert killed.status == -signal.SIGKILL, killed
    assert not out.exists()
    return killed


@pytest.mark.parametrize(
    ("pack", "under", "at", "done", "read"),
    [
        ("exact", SPOOL_NAME, BLOCKS // 2, 0.2, 0.6),
        ("int4", SPOOL_NAME, BLOCKS * 9 // 10, 0.5, 0.2),
        ("exact", ".safetensors", 4, 0.6, 0.01),
        ("int4", ".safetensors", 12, 0.8, 0.01),
        # All is copied, and the file of blocks is gone.
        ("exact", "made", 1, 0.99, 0.01),
    ],
)
def test_killed(
    faults: Faults,
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    pack: str,
    under: str,
    at: int,
    done: float,
    read: float,
) -> None:
    kill(faults, world, out, pack, under, at)
    was_done, was_read = go_on(faults, world, out, pack)
    assert was_done >= done
    assert was_read <= read
    assert content(out) == reference[pack]


@pytest.mark.slow
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("at", range(3, CALLS, 9))
def test_killed_twice_at_any_write(
    faults: Faults,
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    pack: str,
    at: int,
) -> None:
    for number in (at, CALLS // 5):
        faults.run(
            packing(world, out, pack), under=".partial-", calls="pwrite", at=number, do="kill"
        )
    if not out.exists():  # the rest may have taken fewer calls
        go_on(faults, world, out, pack)
    assert content(out) == reference[pack]


@pytest.mark.parametrize("pack", PACKS)
def test_interrupted_while_blocks_are_copied(
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    pack: str,
) -> None:
    read_into, done = Spool.read_into, []

    def failing(self: Spool, buffer: memoryview, start: int) -> None:
        done.append(start)
        if len(done) > 20:
            raise KeyboardInterrupt
        read_into(self, buffer, start)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "read_into", failing)
        assert tiny.run(*packing(world, out, pack)).status == 130
    assert finish(world, "extract", out, "--pack", pack) > 0
    assert content(out) == reference[pack]


@pytest.mark.parametrize(
    ("calls", "at", "code", "said"),
    [
        ("pwrite", 20, errno.ENOSPC, "the disk is full"),
        ("pwrite", 20, errno.EIO, f"its {SPOOL_NAME} cannot be written (Input/output error)"),
        ("preadv", 20, errno.EIO, f"its {SPOOL_NAME} cannot be read (Input/output error)"),
    ],
)
def test_the_file_of_blocks_fails(
    faults: Faults,
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    calls: str,
    at: int,
    code: int,
    said: str,
) -> None:
    command = packing(world, out)
    failed = faults.run(command, under=SPOOL_NAME, calls=calls, at=at, do=str(code))
    assert failed.status == 1, failed
    assert failed.err.startswith("error: ")
    assert said in failed.err
    assert failed.err.count("\n") == 1
    (partial,) = partials(out)
    assert f"% is kept at {partial}" in failed.err
    assert finish(world, "extract", out, "--pack", "exact") > 0
    assert content(out) == reference["exact"]


def test_blocks_whose_sync_fails_are_not_trusted(
    faults: Faults, world: World, reference: dict[str, dict[str, bytes]], out: Path
) -> None:
    command = packing(world, out)
    failed = faults.run(command, under=SPOOL_NAME, calls="fsync", at=1, do=str(errno.EIO))
    assert (failed.status, partials(out)) == (1, [])
    assert "Input/output error" in failed.err
    assert finish(world, "extract", out, "--pack", "exact") == 0
    assert content(out) == reference["exact"]


@pytest.mark.parametrize(("under", "at"), [(SPOOL_NAME, 20), (".safetensors", 4)])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_without_its_blocks_a_run_begins_anew(
    faults: Faults,
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    under: str,
    at: int,
    damage: str,
) -> None:
    kill(faults, world, out, "exact", under, at)
    spool = partials(out)[0] / SPOOL_NAME
    if damage == "cut":
        os.truncate(spool, spool.stat().st_size // 2)
    else:
        spool.unlink()
    assert go_on(faults, world, out, "exact")[0] == 0
    assert content(out) == reference["exact"]


def test_a_shard_that_was_changed_is_copied_anew(
    faults: Faults, world: World, reference: dict[str, dict[str, bytes]], out: Path
) -> None:
    """The blocks are still packed."""
    kill(faults, world, out, "exact", ".safetensors", 12)
    shard = next(path for path in files(partials(out)[0]) if path.suffix == ".safetensors")
    os.truncate(shard, 100)
    done, read = go_on(faults, world, out, "exact")
    assert 0.7 < done < 0.75  # the models are read, nothing is written
    assert read < 0.01
    assert content(out) == reference["exact"]


@pytest.mark.parametrize("interval_s", [0.0, 1e9])
def test_after_a_power_cut_only_synced_blocks_count(
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    interval_s: float,
) -> None:
    """With a sync all the time some count; with none, none."""
    add, done = Spool.add, []

    def failing(self: Spool, data: bytes) -> int:
        done.append(len(data))
        if len(done) == 15 and not interval_s:
            (path,) = out.parent.glob(f".out.partial-*/{journal.JOURNAL_NAME}")
            recorded, ends = path.stat().st_size, time.monotonic() + 60
            while not (found := journal.summarize(path)) or found.synced < recorded:
                assert time.monotonic() < ends
                time.sleep(0.001)
        if len(done) > 20:
            raise KeyboardInterrupt
        return add(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "add", failing)
        patch.setattr(process_output, "SYNC_INTERVAL_S", interval_s)
        patch.setattr("diffxfer.streaming.engine._PROGRESS_INTERVAL_S", 0.001)
        assert tiny.run(*packing(world, out)).status == 130
    monkeypatch.setattr(journal, "boot_id", lambda: b"after the power came back")
    assert (finish(world, "extract", out, "--pack", "exact") > 0) == (interval_s == 0)
    assert content(out) == reference["exact"]


def test_another_way_of_packing_does_not_take_it_up(
    faults: Faults, world: World, out: Path
) -> None:
    kill(faults, world, out, "exact", SPOOL_NAME, 20)
    for options in (("--pack", "int8"), ("--pack", "exact", "--pack-level", "9"), ()):
        refused = tiny.run(*argv(world, "extract", out, *options))
        assert refused.status == 1
        assert "unfinished run with other inputs or options" in refused.err
