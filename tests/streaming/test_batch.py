"""Batches of small tensors give the same bits, checksums and errors as single tensors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from diffxfer.checkpoints.shard_writer import ShardWriter
from diffxfer.errors import NonFiniteError, OutputError
from diffxfer.streaming import engine
from diffxfer.streaming.batch import batches
from diffxfer.streaming.plan import (
    BLOCK_ELEMENTS,
    Operation,
    Plan,
    RunKind,
    TensorTask,
    chunks,
    make_plan,
    whole,
)
from tests.helpers import block_checksum, same_bits, save_shard, to_bits, values
from tests.streaming.test_engine import contents, execute, load, oracle

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NAMES = [f"e.{number:03d}" for number in range(120)]
INPUTS = {Operation.TRANSFER: 3, Operation.APPLY: 2, Operation.SUBTRACT: 2}


def small(dtypes: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """Small tensors of every role, some of them empty."""
    tensors: dict[str, list[Tensor]] = {}
    for number, name in enumerate(NAMES):
        shape = (number % 7, 3) if number % 11 else (1 + number % 3,)
        tensors[name] = [values(dtype, shape, 7 * number + n) for n, dtype in enumerate(dtypes)]
    return tensors


def plan_of(folder: Path, tensors: dict[str, list[Tensor]], operation: Operation) -> Plan:
    slots = range(INPUTS[operation])
    found = [
        save_shard(folder / f"{slot}.safetensors", {n: some[slot] for n, some in tensors.items()})
        for slot in slots
    ]
    # Names in another order lie elsewhere on disk: the last role's are no neighbours any more.
    order = dict(zip(NAMES, reversed(NAMES), strict=True))
    last = {order[name]: some[slots[-1]] for name, some in tensors.items()}
    mixed = save_shard(folder / "mixed.safetensors", last)
    tasks = [
        TensorTask(
            name,
            operation,
            (*(specs[name] for specs in found[:-1]), mixed[order[name]]),
            found[-1][name].dtype,
            found[-1][name].shape,
            runs=whole(RunKind.GRAFT, len(slots)),
            shard="one" if number < 100 else "two",
            alpha=0.5 if 40 <= number < 45 else 1.0,
            sample=tuple(range(0, found[-1][name].elements, 5)),
        )
        for number, name in enumerate(NAMES)
    ]
    return make_plan(tasks, [spec.shard for task in tasks for spec in task.inputs])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("operation", INPUTS)
@pytest.mark.parametrize("dtypes", [("BF16",) * 3, ("F32", "BF16", "F16")])
def test_the_same_as_one_by_one(
    tmp_path: Path, operation: Operation, dtypes: tuple[str, ...], threads: int
) -> None:
    tensors = small(dtypes[: INPUTS[operation]])
    plan = plan_of(tmp_path / "in", tensors, operation)
    assert max(map(len, batches(chunks(plan), plan))) > 20
    results = execute(tmp_path, plan, threads=threads)
    written = load(tmp_path)
    for task in plan.tasks:
        expected = oracle(task, tensors[task.name])
        assert same_bits(written[task.name], expected)
        result = results[task.name]
        assert result.checksum == block_checksum(expected)
        if operation is Operation.SUBTRACT and task.elements:
            finetuned, base = (tensor.double() for tensor in tensors[task.name])
            assert result.input_checksum == block_checksum(tensors[task.name][1])
            assert result.base_norm == pytest.approx(float(base.norm()), rel=1e-8)
            assert result.delta_norm == pytest.approx(float((finetuned - base).norm()), rel=1e-8)
            flat = base.reshape(-1)
            assert result.samples == tuple((index, float(flat[index])) for index in task.sample)
            back = (base + expected.double()).to(tensors[task.name][0].dtype)
            ours = to_bits(tensors[task.name][0])
            assert result.inexact == int((to_bits(back) != ours).sum())


def test_the_first_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tensors = small(("BF16", "BF16"))
    for name in (NAMES[90], NAMES[50]):
        tensors[name][0].view(-1)[-1] = torch.inf
    plan = plan_of(tmp_path / "in", tensors, Operation.APPLY)
    for threads in (1, 3):
        with pytest.raises(NonFiniteError) as caught:
            execute(tmp_path, plan, threads=threads)
        assert caught.value.tensor == NAMES[50]
    written = execute(tmp_path, plan, allow_nonfinite=True)
    assert len(written) == len(NAMES)


@pytest.mark.parametrize("operation", INPUTS)
def test_what_a_cut_off_run_did_one_by_one_is_no_part_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: Operation
) -> None:
    plan = plan_of(tmp_path / "in", small(("BF16",) * INPUTS[operation]), operation)
    expected = execute(tmp_path / "whole", plan, threads=1)
    write, begun, done = ShardWriter.write, itertools.count(), []

    def fail_late(writer: ShardWriter, data: memoryview, offset: int, parts: int = 1) -> None:
        if next(begun) >= 57:
            raise OutputError(tmp_path, "cannot be written", "check the disk")
        write(writer, data, offset, parts)
        done.append(parts)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", fail_late)
        patch.setattr(engine, "batches", lambda chunks, _: ((chunk,) for chunk in chunks))
        with pytest.raises(OutputError, match="cannot be written"):
            execute(tmp_path, plan, threads=3)
    assert done == [1] * 57
    written: list[int] = []

    def tell(writer: ShardWriter, data: memoryview, offset: int, parts: int = 1) -> None:
        written.append(parts)
        write(writer, data, offset, parts)

    monkeypatch.setattr(ShardWriter, "write", tell)
    assert execute(tmp_path, plan, threads=3) == expected
    assert contents(tmp_path) == contents(tmp_path / "whole")
    assert max(written) > 20
    assert sum(written) + sum(done) == sum(1 for _ in chunks(plan))


def test_what_comes_together() -> None:
    def task(name: str, elements: int, start: int, **changes: object) -> TensorTask:
        made = TensorTask(
            *(name, Operation.TRANSFER, (), "BF16", (elements,)),
            runs=whole(RunKind.GRAFT, 0),
            shard="one",
            start=start,
        )
        return replace(made, **changes)  # type: ignore[arg-type]  # one field each

    quarter = BLOCK_ELEMENTS // 4
    tasks = (
        task("a", 10, 0),
        task("b", 10, 20),
        task("other alpha", 10, 40, alpha=0.5),
        task("other shard", 10, 60, alpha=0.5, shard="two"),
        task("a gap before", 10, 100, alpha=0.5, shard="two"),
        task("large", quarter + 1, 120, alpha=0.5, shard="two"),
        task("copied", 10, 0, operation=Operation.COPY, runs=whole(RunKind.COPY, 0)),
        *(task(f"full {n}", quarter, 20 + 2 * quarter * n) for n in range(5)),
    )
    plan = Plan(tasks, {}, ())
    found = [[tasks[chunk.task].name for chunk in batch] for batch in batches(chunks(plan), plan)]
    assert found == [
        ["a", "b"],
        *(["other alpha"], ["other shard"], ["a gap before"], ["large"], ["copied"]),
        [f"full {n}" for n in range(4)],
        ["full 4"],
    ]
