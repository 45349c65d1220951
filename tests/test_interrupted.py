"""However a run is interrupted, nothing is at OUT, and the same command resumes to equal bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch

from diffxfer import transfer
from diffxfer.checkpoints.filesystem import lock_folder
from diffxfer.errors import InputChangedError
from tests import tiny
from tests.checkpoints.test_writer import mounted
from tests.shim import Faults, compile_shim
from tests.tiny import OPERANDS, SHARDS, Outcome, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VERBS = ("transfer", "extract", "apply")
QUICK, SLOW = 4, 50


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("family"))


def make_world(root: Path) -> World:
    """A family of two shards and thirty chunks per model, with an integer tensor."""
    made = World(root)
    for number, role in enumerate(("base", "finetuned", "target")):
        generator = torch.Generator().manual_seed(number)
        weights = {"steps": torch.arange(300_000), "norm": torch.randn(33, generator=generator)}
        for i in range(9):
            drawn = torch.randn((700, 1024), generator=generator)
            weights[f"model.layers.{i}.mlp.up_proj.weight"] = drawn.bfloat16()
        made.folders[role] = tiny.save_model(made.root / role, weights, sharded=True)
    made.folders["diff"] = made.root / "diff" / "out"
    assert tiny.run(*argv(made, "extract", made.folders["diff"])).status == 0
    return made


def argv(world: World, verb: str, out: Path, *options: str) -> list[str]:
    folders = [str(world.folders[role]) for role in OPERANDS[verb]]
    return [verb, *folders, "-o", str(out), "--threads", "2", *options]


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in files(out)}


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def reference(world: World) -> dict[str, dict[str, bytes]]:
    """The results of undisturbed runs; always the same folder name, since it is in the card."""
    found = {}
    for verb in VERBS:
        out = world.root / f"whole-{verb}" / "out"
        assert tiny.run(*argv(world, verb, out)).status == 0
        found[verb] = content(out)
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def faults(library: Path, tmp_path: Path) -> Faults:
    return Faults(library, tmp_path / "log")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output path in a separate, existing folder."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "out"


def partials(out: Path) -> list[Path]:
    return sorted(out.parent.glob(".out.partial-*"))


def fail_reads_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let the disk fail after this number of reads."""
    preadv, done = os.preadv, []

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        done.append(offset)
        if len(done) > count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    patch.setattr(os, "preadv", failing)


def finish(world: World, verb: str, out: Path, *options: str) -> int:
    """Run to the end; returns the bytes that were already done."""
    done = tiny.run(*argv(world, verb, out, *options, "--json"))
    assert (done.status, done.err) == (0, "")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    return int(json.loads(done.out)["resumed_bytes"])


# Killed.


def count_calls(faults: Faults, world: World, verb: str, out: Path, *options: str) -> int:
    done = faults.run(argv(world, verb, out, *options), under=str(out.parent))
    assert done.status == 0
    return done.calls


def kill_and_finish(
    faults: Faults, world: World, verb: str, out: Path, numbers: list[int], *options: str
) -> None:
    old = content(out) if out.exists() else None
    command = argv(world, verb, out, *options)
    for number in numbers:
        killed = faults.run(command, under=str(out.parent), at=number, do="kill")
        assert killed.status in (-signal.SIGKILL, 0), killed
        if out.exists() != (old is not None):
            return  # all that was left to do was to clean up
    done = tiny.run(*command)
    assert (done.status, done.err) == (0, "")


CASES = [
    *range(QUICK),
    *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, QUICK + SLOW)),
]


@pytest.mark.parametrize("seed", CASES)
def test_killed_at_a_random_call(
    seed: int, faults: Faults, world: World, reference: dict[str, dict[str, bytes]], out: Path
) -> None:
    chance = random.Random(seed)
    verb = VERBS[seed % 3]
    options = ("--overwrite",) if seed % 5 == 4 else ()
    if options:
        assert tiny.run(*argv(world, verb, out, "--max-shard-size", "3MB")).status == 0
    calls = {"transfer": 110, "extract": 112, "apply": 108}[verb]  # as many as a whole run makes
    numbers = [chance.randint(1, calls) for _ in range(chance.randint(1, 3))]
    kill_and_finish(faults, world, verb, out, numbers, *options)
    assert content(out) == reference[verb]
    left = [path for path in out.parent.iterdir() if path != out]
    if left:  # killed between the result's appearance and the removal of what is beside it
        assert tiny.run(*argv(world, verb, out, "--overwrite")).status == 0
        assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_call_of_the_end(
    faults: Faults,
    world: World,
    reference: dict[str, dict[str, bytes]],
    tmp_path: Path,
    overwrite: bool,
) -> None:
    options = ("--overwrite",) if overwrite else ()
    counted = tmp_path / "counted" / "out"
    counted.parent.mkdir()
    if overwrite:
        assert tiny.run(*argv(world, "transfer", counted, "--alpha", "0.5")).status == 0
    calls = count_calls(faults, world, "transfer", counted, *options)
    for number in range(calls - 14, calls + 1):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if overwrite:
            assert tiny.run(*argv(world, "transfer", out, "--alpha", "0.5")).status == 0
        command = argv(world, "transfer", out, *options)
        faults.run(command, under=str(out.parent), at=number, do="kill")
        assert out.exists() or not overwrite
        if not out.exists() or content(out) != reference["transfer"]:
            assert tiny.run(*command).status == 0
        assert content(out) == reference["transfer"], number
        assert tiny.run(*argv(world, "transfer", out, "--overwrite")).status == 0
        assert [path.name for path in out.parent.iterdir()] == ["out"], number


def test_killed_at_90_percent_the_next_run_reads_under_15(
    faults: Faults, world: World, reference: dict[str, dict[str, bytes]], out: Path
) -> None:
    command = argv(world, "transfer", out)
    # Two headers and thirty chunks are written.
    killed = faults.run(command, under=".safetensors", calls="pwrite", at=30, do="kill")
    assert killed.status == -signal.SIGKILL
    again = faults.run([*command, "--json"], under=".safetensors", calls="none")
    report = json.loads(again.out)
    total = report["bytes_to_read"] + report["bytes_to_write"]
    assert 0.85 < report["resumed_bytes"] / total < 1
    assert again.read_bytes < 0.15 * report["bytes_to_read"]
    assert content(out) == reference["transfer"]


# Stopped by a person, twice in a hurry.


@pytest.mark.parametrize("pause_s", [0.0, 0.005])
def test_two_interrupts_at_once(
    world: World, reference: dict[str, dict[str, bytes]], out: Path, pause_s: float
) -> None:
    command = [sys.executable, "-m", "diffxfer", *argv(world, "transfer", out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any(
            path.suffix == ".safetensors" for partial in partials(out) for path in files(partial)
        ):
            time.sleep(0.001)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(pause_s)
        _, said = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been quicker
        assert not out.exists()
        assert tiny.run(*command[3:]).status == 0
    assert content(out) == reference["transfer"], said


# The system fails.


@pytest.mark.parametrize(
    ("under", "calls", "at", "code", "said"),
    [
        ("/finetuned/", "preadv", 32, errno.EIO, "cannot be read at byte"),
        (".partial-", "pwrite", 40, errno.EIO, "cannot be written (Input/output error)"),
        pytest.param(
            *(".partial-", "pwrite", 41, errno.ENOSPC, "the disk is full"),
            marks=pytest.mark.slow,
        ),
        (".partial-", "fallocate", 2, errno.EDQUOT, "the disk is full"),
        (".partial-", "write", 2, errno.ENOSPC, "the disk is full"),
        pytest.param(
            *("made", "rename", 1, errno.EIO, "cannot be written (Input/output error)"),
            marks=pytest.mark.slow,
        ),
        ("made", "rename", 2, errno.EIO, "cannot be written (Input/output error)"),
    ],
)
def test_a_call_that_fails(
    faults: Faults,
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    under: str,
    calls: str,
    at: int,
    code: int,
    said: str,
) -> None:
    command = argv(world, "extract", out)
    failed = faults.run(command, under=under, calls=calls, at=at, do=str(code))
    assert failed.status == 1, failed
    assert failed.err.startswith("error: ")
    assert said in failed.err
    assert failed.err.count("\n") == 1
    assert not out.exists()
    (partial,) = partials(out)
    assert f"% is kept at {partial}" in failed.err
    assert finish(world, "extract", out) > 0
    assert content(out) == reference["extract"]


@pytest.mark.parametrize("at", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4)), 5, 8])
def test_a_sync_that_fails_is_not_trusted(
    faults: Faults, world: World, reference: dict[str, dict[str, bytes]], out: Path, at: int
) -> None:
    """The first syncs are of the journal and its folder, then of the shards and the small files."""
    command = argv(world, "transfer", out)
    failed = faults.run(command, under="made", calls="fsync", at=at, do=str(errno.EIO))
    assert (failed.status, out.exists()) == (1, False)
    assert "Input/output error" in failed.err
    assert ("% is kept at" in failed.err) == (at == 8), failed.err
    assert (partials(out) == []) == (at != 8)
    assert (finish(world, "transfer", out) > 0) == (at == 8)
    assert content(out) == reference["transfer"]


@pytest.mark.parametrize("verb", ["transfer", "extract"])
def test_short_reads_and_writes_change_nothing(
    faults: Faults, world: World, reference: dict[str, dict[str, bytes]], out: Path, verb: str
) -> None:
    done = faults.run(
        argv(world, verb, out), under="/", calls="preadv pwrite write", at=1, do="short"
    )
    assert done.status == 0, done.err
    assert content(out) == reference[verb]


def test_a_limit_on_the_size_of_files(
    faults: Faults, world: World, reference: dict[str, dict[str, bytes]], out: Path
) -> None:
    """The second shard is smaller, and may be written."""
    limit = (1 << 22, 1 << 22)
    failed = faults.run(
        argv(world, "transfer", out),
        under="nothing",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert failed.status == 1
    assert "(File too large)" in failed.err
    assert failed.err.count("\n") == 1
    finish(world, "transfer", out)
    assert content(out) == reference["transfer"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "64m") as folder:
        yield folder


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_disk_that_becomes_full(
    world: World,
    reference: dict[str, dict[str, bytes]],
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = disk / "out"
    with monkeypatch.context() as patch:
        # The disk fills up after the last check of its free space.
        statvfs, looked = os.statvfs, []

        def look(path: Path) -> os.statvfs_result:
            found = statvfs(path)
            looked.append(found)
            if len(looked) == 2:
                remount(disk, "size=14m")
            return found

        patch.setattr(os, "statvfs", look)
        failed = tiny.run(*argv(world, "transfer", out))
    assert failed.status == 1
    assert "the disk is full" in failed.err
    assert failed.err.count("\n") == 1
    assert not out.exists()
    remount(disk, "size=64m")
    finish(world, "transfer", out)
    assert content(out) == reference["transfer"]


def test_what_is_kept_counts_as_free(
    world: World,
    reference: dict[str, dict[str, bytes]],
    disk: Path,
    begin_at: Callable[..., Path],
) -> None:
    begin_at(disk / "out")
    remount(disk, "size=18m")
    assert finish(world, "transfer", disk / "out") > 0
    assert content(disk / "out") == reference["transfer"]


def test_a_parent_that_cannot_be_written(world: World, disk: Path) -> None:
    remount(disk, "ro")
    for out in (disk / "out", disk / "deeper" / "out"):
        refused = tiny.run(*argv(world, "transfer", out))
        assert refused.status == 1
        assert refused.err.startswith(f"error: {out}: cannot be written (Read-only file system)")
        assert refused.err.count("\n") == 1
    assert list(disk.iterdir()) == []


# Inputs go or change.


@pytest.fixture
def copied(world: World, tmp_path: Path) -> World:
    return world.copy(tmp_path / "copied")


def transfer_and(world: World, out: Path, act: Callable[[], object]) -> None:
    """Transfer, and do something before the last look at the inputs."""
    folders = [world.folders[role] for role in OPERANDS["transfer"]]

    def progress(done: int, total: int) -> None:
        if done == total:
            act()

    transfer(*folders, out, progress=progress)


def test_an_input_that_vanishes_and_comes_back(
    copied: World, reference: dict[str, dict[str, bytes]], out: Path
) -> None:
    shard = copied.folders["base"] / SHARDS[0]
    away = shard.with_suffix(".away")
    with pytest.raises(InputChangedError, match=r"vanished while it was read; .* % is kept at"):
        transfer_and(copied, out, lambda: shard.rename(away))
    assert not out.exists()
    away.rename(shard)
    assert finish(copied, "transfer", out) > 0
    assert content(out) == reference["transfer"]


def test_an_input_that_changes_makes_what_was_done_useless(copied: World, out: Path) -> None:
    shard = copied.folders["base"] / SHARDS[0]
    with pytest.raises(InputChangedError, match="changed while it was read"):
        transfer_and(copied, out, lambda: os.utime(shard, ns=(0, 0)))
    assert list(out.parent.iterdir()) == []
    assert finish(copied, "transfer", out) == 0


# What is found there.


@pytest.fixture
def begin_at(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that leaves an unfinished transfer and returns its partial folder."""

    def begin(out: Path, *options: str, reads: int = 60) -> Path:
        with monkeypatch.context() as patch:
            fail_reads_after(patch, reads)
            failed = tiny.run(*argv(world, "transfer", out, *options))
        assert failed.status == 1
        assert failed.err.count("\n") == 1
        assert not out.exists()
        (partial,) = partials(out)
        assert re.search(rf"\d+ % is kept at {partial}, and the same command continues", failed.err)
        return partial

    return begin


def test_the_threads_of_the_next_run_do_not_matter(
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    begin_at: Callable[..., Path],
) -> None:
    begin_at(out)
    assert finish(world, "transfer", out, "--threads", "1") > 0
    assert content(out) == reference["transfer"]


def test_other_options_do_not_go_on_from_it_and_restart_discards_it(
    world: World, out: Path, begin_at: Callable[..., Path]
) -> None:
    partial = begin_at(out)
    before = tiny.tree(out.parent)
    refused = tiny.run(*argv(world, "transfer", out, "--alpha", "0.5"))
    assert refused.status == 1
    assert re.fullmatch(
        rf"error: {out}: has an unfinished run with other inputs or options: "
        rf"\d+ % is kept at {partial}; repeat that run's command to continue it, "
        r"or give --restart to discard it\n",
        refused.err,
    )
    planned = tiny.run(*argv(world, "transfer", out, "--alpha", "0.5", "--dry-run"))
    assert re.search(rf"^warning: an unfinished run .* is kept at {partial}$", planned.err, re.M)
    assert tiny.tree(out.parent) == before
    assert finish(world, "transfer", out, "--alpha", "0.5", "--restart") == 0


def test_restart_discards_what_the_same_command_did(
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    begin_at: Callable[..., Path],
) -> None:
    begin_at(out)
    assert finish(world, "transfer", out, "--restart") == 0
    assert content(out) == reference["transfer"]


def test_a_second_run_is_refused(world: World, out: Path, begin_at: Callable[..., Path]) -> None:
    partial = begin_at(out)
    before = tiny.tree(out.parent)
    fd = lock_folder(partial)
    try:
        for options in ((), ("--restart",), ("--alpha", "0.5"), ("--alpha", "0.5", "--restart")):
            refused = tiny.run(*argv(world, "transfer", out, *options))
            said = "is being written by another run; wait for that run, or choose another -o"
            assert refused == Outcome(1, "", f"error: {out}: {said}\n")
    finally:
        os.close(fd)
    assert tiny.tree(out.parent) == before


def test_what_is_not_ours_is_left_alone(
    world: World, out: Path, begin_at: Callable[..., Path]
) -> None:
    partial = begin_at(out)
    theirs = out.parent / ".out.partial-0123456789ab"
    theirs.mkdir()
    (theirs / "precious").write_text("theirs")
    done = tiny.run(*argv(world, "transfer", out, "--restart"))
    assert done.status == 0
    assert (theirs / "precious").read_text() == "theirs"
    shutil.rmtree(out)
    theirs.rename(partial)
    refused = tiny.run(*argv(world, "transfer", out, "--restart"))
    assert refused.status == 1
    assert (
        f"error: {partial}: was not written by diffxfer, but has the name that it needs; move it"
        in refused.err
    )
    assert (partial / "precious").read_text() == "theirs"


@pytest.mark.parametrize("harm", ["header", "size", "gone"])
def test_files_that_somebody_meddled_with_are_made_anew(
    harm: str,
    world: World,
    reference: dict[str, dict[str, bytes]],
    out: Path,
    begin_at: Callable[..., Path],
) -> None:
    partial = begin_at(out)
    shard = partial / SHARDS[0]
    if harm == "header":
        with shard.open("r+b") as file:
            file.write(b"x")
    elif harm == "size":
        os.truncate(shard, 100)
    else:
        shard.unlink()
    (partial / "stray").write_text("not of this run")
    assert finish(world, "transfer", out) == 0
    assert content(out) == reference["transfer"]
