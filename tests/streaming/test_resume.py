"""An unfinished run is continued to the same bytes and results."""

from __future__ import annotations

import errno
import math
import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffxfer.checkpoints import journal
from diffxfer.checkpoints.journal import summarize
from diffxfer.checkpoints.partial import JOURNAL_NAME
from diffxfer.checkpoints.writer import OutputFolder
from diffxfer.errors import CheckpointError, OutputError
from diffxfer.streaming import run
from diffxfer.streaming.completed import Completed, pack, unpack
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Operation, Plan, chunks
from diffxfer.streaming.run import run_plan
from diffxfer.streaming.statistics import ChunkResult
from tests.helpers import values
from tests.streaming.test_engine import JOB, OPERATIONS, contents, make_case, plan_of, row_case

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.streaming.statistics import TensorResult

Made = tuple["Sequence[TensorResult]", "Mapping[str, bytes]"]

DOUBLES = st.floats() | st.sampled_from([-0.0, math.nan, math.inf, 5e-324])


@st.composite
def chunk_results(draw: st.DrawFn) -> ChunkResult:
    blocks = draw(st.integers(0, 3))
    norms = st.lists(DOUBLES, min_size=blocks, max_size=blocks).map(tuple)
    samples = st.lists(st.tuples(st.integers(0, (1 << 64) - 1), DOUBLES), max_size=4).map(tuple)
    width = draw(st.integers(1, 17))
    sums = st.lists(st.tuples(*[DOUBLES] * width), max_size=3).map(tuple)
    return ChunkResult(
        draw(st.binary(max_size=64)),
        draw(st.binary(max_size=64)),
        draw(st.integers(0, 1 << 40)),
        draw(st.integers(0, 1 << 40)),
        draw(norms),
        draw(norms),
        draw(samples),
        sums=draw(sums),
    )


def bits(result: ChunkResult) -> tuple[Any, ...]:
    doubles = (*result.delta_squares, *result.base_squares, *(x for _, x in result.samples))
    doubles += tuple(x for block in result.sums for x in block)
    return (
        *(result.digests, result.input_digests, result.inexact, result.unchanged),
        *(len(result.delta_squares), [len(block) for block in result.sums]),
        *(struct.pack("<d", x) for x in doubles),
        *(index for index, _ in result.samples),
    )


@given(chunk_results())
def test_what_is_known_of_a_chunk_comes_back_bit_for_bit(result: ChunkResult) -> None:
    assert bits(unpack(pack(result))) == bits(result)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Every operation over two shards, in fifteen chunks that are written; one that is not, too."""
    folder = tmp_path_factory.mktemp("in")
    large = (3 * BLOCK_ELEMENTS + 1,)
    tasks = []
    for operation, count in {**OPERATIONS, Operation.DIGEST: 1}.items():
        tensors = [values(dtype, large, slot) for slot, dtype in enumerate(["BF16", "F16", "F32"])]
        silent = operation is Operation.DIGEST
        case = make_case(
            *(folder, operation.value, operation, tensors[:count], "BF16"),
            alpha=0.1,
            shard=None if silent else "b" if count == 2 else "a",
            sample=tuple(range(0, large[0], 9973)),
        )
        tasks.append(case.task)
    tasks.append(row_case(folder, Operation.SUBTRACT, ("BF16", "F16"), "F16").task)
    return plan_of(*tasks)


def finish(folder: Path, plan: Plan, **options: Any) -> tuple[Made, int]:
    with OutputFolder(folder / "out", JOB) as out:
        results, resumed = run_plan(plan, out, **options)
        out.publish()
    return (results, contents(folder)), resumed


@pytest.fixture(scope="module")
def reference(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return finish(tmp_path_factory.mktemp("reference"), plan)[0]


def interrupt(
    folder: Path,
    plan: Plan,
    patch: pytest.MonkeyPatch,
    writes: int,
    *,
    error: BaseException | None = None,
    **options: Any,
) -> Path:
    """Let the disk fail at a write of tensors, or another thing happen; the partial folder."""
    raised = error or OSError(errno.EIO, os.strerror(errno.EIO))
    pwrite, done = os.pwrite, []

    def failing(fd: int, data: bytes, offset: int) -> int:
        if len(data) > 1 << 16:
            done.append(offset)
            if len(done) > writes:
                raise raised
        return pwrite(fd, data, offset)

    with patch.context() as context:
        context.setattr(os, "pwrite", failing)
        with pytest.raises(type(error) if error else OutputError):
            finish(folder, plan, **options)
    (partial,) = folder.glob(".out.partial-*")
    return partial


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("writes", [1, 4, 9, 14])
def test_a_run_goes_on_to_the_same_result(
    tmp_path: Path,
    plan: Plan,
    reference: Made,
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
    threads: int,
) -> None:
    interrupt(tmp_path, plan, monkeypatch, writes, threads=threads)
    calls: list[tuple[int, int]] = []
    made, resumed = finish(
        tmp_path, plan, threads=2, progress=lambda done, total: calls.append((done, total))
    )
    assert made == reference
    assert calls[0][0] == resumed > 0
    assert calls == sorted(calls)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_is_cut_off_again_and_again(
    tmp_path: Path, plan: Plan, reference: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    for _ in range(5):
        partial = interrupt(tmp_path, plan, monkeypatch, 2, threads=1)
        known = summarize(partial / JOURNAL_NAME)
        assert known is not None
        done.append(known.done_bytes)
    assert done == sorted(set(done))
    assert finish(tmp_path, plan) == (reference, done[-1])


def covered(partial: Path, plan: Plan) -> set[tuple[str, int, int]]:
    """The places in shards of which the journal says that they are done."""
    with OutputFolder(partial.parent / "out", JOB) as folder:
        completed = Completed(plan, BLOCK_ELEMENTS, folder)
        found = set()
        for chunk in chunks(plan):
            task = plan.tasks[chunk.task]
            if chunk.number in completed and task.shard is not None:
                start = task.start + chunk.start * task.itemsize
                found.add((task.shard, start, start + chunk.count * task.itemsize))
    return found


def test_what_a_failure_keeps_is_on_the_disk_for_good(
    tmp_path: Path, plan: Plan, reference: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupt(tmp_path, plan, monkeypatch, 9)
    known = summarize(partial / JOURNAL_NAME)
    assert known is not None
    monkeypatch.setattr(journal, "boot_id", lambda: b"after the power came back")
    assert finish(tmp_path, plan) == (reference, known.done_bytes)


@pytest.mark.parametrize("interval_s", [0.0, 1e9])
def test_after_a_power_cut_only_what_was_synced_is_taken_for_done(
    tmp_path: Path,
    plan: Plan,
    reference: Made,
    monkeypatch: pytest.MonkeyPatch,
    interval_s: float,
) -> None:
    monkeypatch.setattr(run, "SYNC_INTERVAL_S", interval_s)
    fail_slowly(monkeypatch)
    partial = interrupt(tmp_path, plan, monkeypatch, 13, threads=1, error=KeyboardInterrupt())
    before = covered(partial, plan)
    monkeypatch.setattr(journal, "boot_id", lambda: b"after the power came back")
    known = summarize(partial / JOURNAL_NAME)
    assert known is not None
    assert (known.done_bytes > 0) == (interval_s == 0)
    if known.done_bytes == 0:
        assert finish(tmp_path, plan) == (reference, 0)
        return
    after = covered(partial, plan)
    assert after < before or after == before
    for shard, layout in plan.layouts.items():
        # Everything else is lost: none of it may reach the result.
        with (partial / shard).open("r+b") as file:
            sound = {0: file.read(len(layout.header))}
            for name, start, stop in after:
                if name == shard:
                    file.seek(start)
                    sound[start] = file.read(stop - start)
            file.seek(0)
            file.write(b"\xaa" * layout.size)
            for start, data in sound.items():
                file.seek(start)
                file.write(data)
    made, resumed = finish(tmp_path, plan)
    assert made == reference
    assert resumed == known.done_bytes


def fail_slowly(patch: pytest.MonkeyPatch) -> None:
    """Reads that take a while, so that a sync comes between them."""
    preadv = os.preadv

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(0.01)
        return preadv(fd, buffers, offset)

    patch.setattr(os, "preadv", slow)


def test_a_sync_that_fails_ends_the_run_and_takes_back_what_it_should_have_covered(
    tmp_path: Path, plan: Plan, reference: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, failed = os.fsync, []

    def failing(fd: int) -> None:
        name = str(Path(f"/proc/self/fd/{fd}").readlink())
        if name.endswith(("/a", "/b")):
            failed.append(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(run, "SYNC_INTERVAL_S", 0.0)
        patch.setattr(os, "fsync", failing)
        fail_slowly(patch)
        with pytest.raises(OutputError, match=r"Input/output error"):
            finish(tmp_path, plan, threads=1)
    assert failed
    assert finish(tmp_path, plan) == (reference, 0)


def test_a_journal_that_cannot_be_written_ends_the_run(
    tmp_path: Path, plan: Plan, reference: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, done = os.pwrite, []

    def failing(fd: int, data: bytes, offset: int) -> int:
        if len(data) < 1 << 12:
            done.append(offset)
            if len(done) > 12:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(OutputError, match=r"the disk is full; .* % is kept at"):
            finish(tmp_path, plan, threads=2)
    made, resumed = finish(tmp_path, plan)
    assert made == reference
    assert resumed > 0


def test_an_input_that_cannot_be_read_keeps_what_was_done(
    tmp_path: Path, plan: Plan, reference: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, done = os.preadv, []

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        done.append(offset)
        if len(done) > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(CheckpointError, match=r"check the disk; \d+ % is kept at"):
            finish(tmp_path, plan, threads=2)
    made, resumed = finish(tmp_path, plan)
    assert made == reference
    assert resumed > 0
