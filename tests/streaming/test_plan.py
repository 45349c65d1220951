"""Plans: every element of an output is in exactly one piece, with the right sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffxfer.checkpoints.layout import layout_shard
from diffxfer.checkpoints.stored import BITS, ShardFile, TensorSpec
from diffxfer.streaming.plan import (
    BLOCK_ELEMENTS,
    Chunk,
    Operation,
    Plan,
    Run,
    RunKind,
    TensorTask,
    bytes_read,
    chunks,
    chunks_of,
    inputs_used,
    make_plan,
    whole,
)

FILE = ShardFile(Path("model.safetensors"), 0, (0, 0, 0, 0), "")


def spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, dtype, shape, 0, FILE)


def task(name: str, shape: tuple[int, ...] = (4,), **changes: Any) -> TensorTask:
    inputs = tuple(spec(name, "BF16", shape) for _ in range(3))
    fields = {"dtype": "BF16", "runs": whole(RunKind.GRAFT, 3), "shard": "one"} | changes
    return TensorTask(name, Operation.TRANSFER, inputs, shape=shape, **fields)


def cut(one: TensorTask, chunk_elements: int = BLOCK_ELEMENTS) -> list[Chunk]:
    return list(chunks(Plan((one,), {}, ()), chunk_elements))


def test_tasks_come_in_the_order_of_their_files() -> None:
    tasks = [
        task("layers.10", shard="two"),
        task("layers.2", shard="two"),
        task("wide", shard="two", dtype="F32"),
        task("a", shard="one"),
        task("look", shard=None),
        task("peek", shard=None),
    ]
    plan = make_plan(tasks, [FILE])
    names = ["look", "peek", "a", "wide", "layers.10", "layers.2"]
    assert [one.name for one in plan.tasks] == names
    assert list(plan.layouts) == ["one", "two"]
    assert plan.inputs == (FILE,)
    starts = [one.start for one in plan.tasks if one.shard == "two"]
    assert starts == sorted(starts) == sorted(plan.layouts["two"].starts.values())


def test_a_plan_lays_its_shards_out_as_save_file_does() -> None:
    tasks = [task("b"), task("a", (0, 3)), task("c", (), dtype="F32")]
    plan = make_plan(tasks, [])
    expected = layout_shard((one.name, one.dtype, one.shape) for one in tasks)
    assert plan.layouts == {"one": expected}
    assert plan.bytes_to_write == expected.size


def test_placing_a_task_changes_nothing_else() -> None:
    one = task("a", alpha=0.5, sample=(1, 3))
    (placed,) = make_plan([one], []).tasks
    for field in TensorTask.__dataclass_fields__:
        if field != "start":
            assert getattr(placed, field) == getattr(one, field)
    assert placed.start > 0


def test_a_plan_of_nothing() -> None:
    plan = make_plan([], [])
    assert list(chunks(plan)) == []
    assert plan.bytes_to_read == plan.bytes_to_write == 0


@pytest.mark.parametrize(
    ("kind", "inputs", "used"),
    [
        (RunKind.GRAFT, 3, [0, 1, 2]),
        (RunKind.COPY, 3, [2]),
        (RunKind.COPY, 1, [0]),
        (RunKind.ADD, 3, [0]),
        (RunKind.ZERO, 2, []),
    ],
)
def test_which_inputs_a_run_reads(kind: RunKind, inputs: int, used: list[int]) -> None:
    assert list(inputs_used(kind, inputs)) == used


def test_the_bytes_read_are_those_of_the_inputs_used() -> None:
    shape = (10, 3)
    inputs = (spec("a", "F32", shape), spec("a", "BF16", shape), spec("a", "F64", shape))
    runs = (
        Run(RunKind.GRAFT, 0, 4, (0, 0, 0)),
        Run(RunKind.COPY, 4, 3, (-1, -1, 4)),
        Run(RunKind.ADD, 7, 2, (7, -1, -1)),
        Run(RunKind.ZERO, 9, 1, (-1, -1, -1)),
    )
    one = TensorTask("a", Operation.TRANSFER, inputs, "F64", shape, runs=runs)
    assert bytes_read(one) == 3 * (4 * (4 + 2 + 8) + 3 * 8 + 2 * 4)
    assert bytes_read(task("empty", (0, 5))) == 0
    assert bytes_read(task("scalar", ())) == 6


@pytest.mark.parametrize(
    "elements", [0, 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 10 * BLOCK_ELEMENTS]
)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_whole_tensor_is_cut_into_chunks_of_the_size_asked_for(
    elements: int, blocks: int
) -> None:
    one, step = task("a", (elements,)), blocks * BLOCK_ELEMENTS
    found = cut(one, step)
    assert len(found) == chunks_of(one, step)
    assert [chunk.start for chunk in found] == list(range(0, elements, step))
    assert [chunk.number for chunk in found] == list(range(len(found)))
    assert sum(chunk.count for chunk in found) == elements
    for chunk in found:
        (piece,) = chunk.pieces
        assert (piece.at, piece.count, piece.sources) == (0, chunk.count, (chunk.start,) * 3)


def test_chunks_are_numbered_through_a_plan_and_skip_empty_tensors() -> None:
    shapes = [(BLOCK_ELEMENTS + 1,), (0,), (), (3, 0, 2), (2, 2)]
    plan = Plan(tuple(task(str(i), shape) for i, shape in enumerate(shapes)), {}, ())
    found = list(chunks(plan))
    assert [(chunk.number, chunk.task) for chunk in found] == [(0, 0), (1, 0), (2, 2), (3, 4)]


def test_chunks_are_made_as_they_are_needed() -> None:
    huge = task("huge", (1 << 50,))
    assert next(chunks(Plan((huge,), {}, ()))).count == BLOCK_ELEMENTS
    assert chunks_of(huge, BLOCK_ELEMENTS) == 1 << 32


kinds = st.lists(
    st.tuples(st.sampled_from(RunKind), st.integers(1, 40), st.integers(0, 50)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(kinds, st.sampled_from([1, 7, 4096, 50_000, 300_000]), st.integers(1, 3))
def test_pieces_cover_every_element_once(
    described: list[tuple[RunKind, int, int]], width: int, blocks: int
) -> None:
    runs, rows = [], 0
    for kind, count, source in described:
        used = inputs_used(kind, 3)
        sources = tuple(source + slot if slot in used else -1 for slot in range(3))
        runs.append(Run(kind, rows, count, sources))
        rows += count
    one = task("a", (rows, width), runs=tuple(runs))
    position = 0
    for chunk in cut(one, blocks * BLOCK_ELEMENTS):
        assert chunk.start == position
        assert chunk.start % BLOCK_ELEMENTS == 0
        assert chunk.count <= blocks * BLOCK_ELEMENTS
        for piece in chunk.pieces:
            assert chunk.start + piece.at == position
            assert piece.count > 0
            check_piece(piece, position, runs, width)
            position += piece.count
    assert position == rows * width
    assert len(cut(one, blocks * BLOCK_ELEMENTS)) == chunks_of(one, blocks * BLOCK_ELEMENTS)


def check_piece(piece: Any, position: int, runs: list[Run], width: int) -> None:
    """The first and last element of a piece lie in one run, and come from its rows."""
    row = position // width
    run = next(run for run in runs if run.start <= row < run.start + run.count)
    assert piece.kind is run.kind
    assert position + piece.count <= (run.start + run.count) * width
    inside = position - run.start * width
    expected = tuple(first * width + inside if first >= 0 else -1 for first in run.rows)
    assert tuple(max(source, -1) for source in piece.sources) == expected


def test_the_sizes_of_elements_come_from_the_dtype() -> None:
    for dtype in ("F64", "F32", "BF16", "F16", "BOOL"):
        assert task("a", dtype=dtype).itemsize == BITS[dtype] // 8
