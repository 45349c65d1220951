"""The engine against an oracle in memory, bit for bit, whatever the threads and chunks."""

from __future__ import annotations

import math
import os
import resource
import tempfile
import threading
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from diffxfer.checkpoints import shard_writer
from diffxfer.checkpoints.writer import OutputFolder
from diffxfer.errors import (
    DiskSpaceError,
    InputChangedError,
    MatchError,
    NonFiniteError,
    OptionError,
    OutputError,
)
from diffxfer.streaming.plan import (
    BLOCK_ELEMENTS,
    Operation,
    Plan,
    Run,
    RunKind,
    TensorTask,
    inputs_used,
    make_plan,
    whole,
)
from diffxfer.streaming.run import default_threads, run_plan
from tests.helpers import DTYPES, block_checksum, open_files, same_bits, save_shard, to_bits, values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diffxfer.checkpoints.stored import TensorSpec
    from diffxfer.streaming.statistics import TensorResult

JOB = "0123456789abcdef" * 2
ALPHAS = [1.0, 0.5, -1.3, 0.1]
OPERATIONS = {
    Operation.TRANSFER: 3,
    Operation.APPLY: 2,
    Operation.SUBTRACT: 2,
    Operation.COPY: 1,
}
"""Those that write, and how many inputs they have."""


@dataclass(frozen=True)
class Case:
    """A task, the tensors that it reads, and what must come out."""

    task: TensorTask
    tensors: tuple[Tensor, ...]

    @property
    def expected(self) -> Tensor:
        return oracle(self.task, self.tensors)


def oracle(task: TensorTask, tensors: Sequence[Tensor]) -> Tensor:
    """What a task's output is, by definition."""
    rows = task.runs[-1].start + task.runs[-1].count
    out = torch.zeros(task.shape, dtype=DTYPES[task.dtype])
    if out.numel() == 0:
        return out
    flat = out.view(rows, -1)
    parts = [tensor.reshape(-1, flat.shape[1]) for tensor in tensors]
    for run in task.runs:
        taken = [
            part[row : row + run.count] if row >= 0 else None
            for part, row in zip(parts, run.rows, strict=True)
        ]
        place = flat[run.start : run.start + run.count]
        if run.kind is RunKind.GRAFT:
            place[:] = arithmetic(task.operation, taken, task.alpha).to(out.dtype)
        elif run.kind is not RunKind.ZERO:
            place[:] = taken[0 if run.kind is RunKind.ADD else -1].to(out.dtype)
    return out


def arithmetic(operation: Operation, inputs: Sequence[Any], alpha: float) -> Tensor:
    wide = [tensor.double() for tensor in inputs]
    if operation is Operation.TRANSFER:
        return wide[2] + (wide[0] - wide[1]) * alpha
    if operation is Operation.APPLY:
        return wide[1] + wide[0] * alpha
    if operation is Operation.SUBTRACT:
        return wide[0] - wide[1]
    return wide[0]


def make_case(
    folder: Path,
    name: str,
    operation: Operation,
    tensors: Sequence[Tensor],
    dtype: str,
    *,
    runs: tuple[Run, ...] | None = None,
    shape: tuple[int, ...] | None = None,
    shard: str | None = "model.safetensors",
    **changes: Any,
) -> Case:
    """Write the inputs of a task, each to a shard of its own."""
    specs: list[TensorSpec] = []
    for slot, tensor in enumerate(tensors):
        specs += save_shard(folder / f"{name}-{slot}.safetensors", {name: tensor}).values()
    if runs is None:
        kind = RunKind.COPY if operation is Operation.COPY else RunKind.GRAFT
        runs = whole(kind, len(tensors))
    task = TensorTask(
        name,
        operation,
        tuple(specs),
        dtype,
        tuple(tensors[-1].shape) if shape is None else shape,
        runs=runs,
        shard=shard,
        **changes,
    )
    return Case(task, tuple(tensors))


def plan_of(*tasks: TensorTask) -> Plan:
    return make_plan(tasks, [spec.shard for task in tasks for spec in task.inputs])


def execute(folder: Path, plan: Plan, **options: Any) -> dict[str, TensorResult]:
    """Run a plan into `folder/out`; the results by name."""
    with OutputFolder(folder / "out", JOB) as out:
        results, _ = run_plan(plan, out, **options)
        out.publish()
    return {task.name: result for task, result in zip(plan.tasks, results, strict=True)}


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an output."""
    found: dict[str, Tensor] = {}
    for path in (folder / "out").iterdir():
        found |= load_file(path)
    return found


def check(folder: Path, cases: Sequence[Case], **options: Any) -> dict[str, TensorResult]:
    """Run tasks and compare every bit and every checksum."""
    results = execute(folder, plan_of(*(case.task for case in cases)), **options)
    written = load(folder)
    assert written.keys() == {case.task.name for case in cases}
    for case in cases:
        name, expected = case.task.name, case.expected
        assert same_bits(written[name], expected), name
        assert results[name].checksum == block_checksum(expected)
    return results


# Arithmetic.


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("part", ["some", pytest.param("every", marks=pytest.mark.slow)])
def test_every_mix_of_dtypes(tmp_path: Path, operation: Operation, alpha: float, part: str) -> None:
    count = OPERATIONS[operation]
    cases = []
    for number, mix in enumerate(product(DTYPES, repeat=count + 1)):
        if part == "some" and count > 1 and number % 13:
            continue  # each is compiled
        tensors = [values(dtype, (7, 61), number + slot) for slot, dtype in enumerate(mix[:-1])]
        name = "-".join(mix)
        cases.append(make_case(tmp_path / "in", name, operation, tensors, mix[-1], alpha=alpha))
    check(tmp_path, cases, threads=2)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_many_blocks(tmp_path: Path, operation: Operation, dtype: str) -> None:
    others = [name for name in DTYPES if name != dtype]
    cases = []
    for name, elements in {"a": 2 * BLOCK_ELEMENTS + 17, "b": BLOCK_ELEMENTS, "c": 1}.items():
        roles = [dtype, others[0], others[1]][: OPERATIONS[operation]]
        tensors = [values(role, (elements,), slot) for slot, role in enumerate(roles)]
        cases.append(make_case(tmp_path / "in", name, operation, tensors, dtype, alpha=-1.3))
    check(tmp_path, cases, threads=3)


def odd_tensors() -> dict[str, Tensor]:
    return {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "i64": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "u8": torch.arange(300).to(torch.uint8),
        "experts": values("BF16", (2, 3, 4), 0),
        "minus": torch.tensor([-0.0, 0.0]),
        "größe \n": values("F16", (3,), 1),
    }


def test_copies_every_kind_of_tensor(tmp_path: Path) -> None:
    tensors = odd_tensors()
    specs = save_shard(tmp_path / "in.safetensors", tensors)
    tasks = [
        TensorTask(
            *(name, Operation.COPY, (spec,), spec.dtype, spec.shape),
            runs=whole(RunKind.COPY, 1),
            shard="model.safetensors",
        )
        for name, spec in specs.items()
    ]
    results = execute(tmp_path, plan_of(*tasks))
    copied = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert copied == (tmp_path / "in.safetensors").read_bytes()
    for name, tensor in tensors.items():
        assert results[name].checksum == block_checksum(tensor)
        assert results[name].input_checksum is None


def test_every_pattern_of_16_bits_when_all_is_allowed(tmp_path: Path) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    cases = []
    for dtype in ("BF16", "F16"):
        target, base = patterns.view(DTYPES[dtype]), patterns.flip(0).view(DTYPES[dtype])
        for out in DTYPES:
            tensors = (patterns.roll(99).view(DTYPES[dtype]), base, target)
            cases.append(
                make_case(
                    *(tmp_path / "in", f"{dtype}-{out}", Operation.TRANSFER, tensors, out),
                    alpha=0.1,
                )
            )
    execute(tmp_path, plan_of(*(case.task for case in cases)), threads=2, allow_nonfinite=True)
    written = load(tmp_path)
    for case in cases:
        got, expected = written[case.task.name], case.expected
        numbers = ~torch.isnan(expected)
        assert torch.equal(torch.isnan(got), ~numbers)
        assert torch.equal(to_bits(got)[numbers], to_bits(expected)[numbers])


def test_a_plan_of_nothing(tmp_path: Path) -> None:
    assert execute(tmp_path, plan_of()) == {}
    assert load(tmp_path) == {}


def test_a_shard_of_empty_tensors_alone(tmp_path: Path) -> None:
    empty = torch.empty(0, 3)
    check(tmp_path, [make_case(tmp_path / "in", "e", Operation.COPY, [empty], "F32")])


# Runs of rows.

WIDTH = 700
RUNS = (
    Run(RunKind.GRAFT, 0, 400, (10, 5, 0)),
    Run(RunKind.COPY, 400, 1, (-1, -1, 480)),
    Run(RunKind.ADD, 401, 2, (470, -1, -1)),
    Run(RunKind.GRAFT, 403, 3, (0, 60, 70)),
    Run(RunKind.ZERO, 406, 5, (-1, -1, -1)),
    Run(RunKind.GRAFT, 411, 200, (200, 250, 100)),
    Run(RunKind.COPY, 611, 389, (-1, -1, 100)),
)


def row_case(folder: Path, operation: Operation, mix: Sequence[str], out: str) -> Case:
    """A task whose rows are treated differently, its blocks cut through runs and rows."""
    count = OPERATIONS[operation]
    tensors = [values(dtype, (500, WIDTH), slot) for slot, dtype in enumerate(mix[:count])]
    runs = tuple(
        replace(run, rows=run.rows[:count] if count == 3 else (run.rows[0], run.rows[2]))
        for run in RUNS
    )
    if operation is Operation.SUBTRACT:  # there is no target to copy
        zero = {"kind": RunKind.ZERO, "rows": (-1, -1)}
        runs = tuple(replace(run, **zero) if run.kind is RunKind.COPY else run for run in runs)
    return make_case(
        *(folder, "rows", operation, tensors, out),
        runs=runs,
        shape=(1000, WIDTH),
        alpha=0.1,
        sample=tuple(range(3, 1000 * WIDTH, 7919)),
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("operation", [Operation.TRANSFER, Operation.APPLY, Operation.SUBTRACT])
@pytest.mark.parametrize("mix", [("BF16", "BF16", "BF16"), ("F16", "F64", "F32")])
def test_rows_that_are_treated_differently(
    tmp_path: Path, operation: Operation, mix: Sequence[str], threads: int
) -> None:
    check(tmp_path, [row_case(tmp_path / "in", operation, mix, "BF16")], threads=threads)


def alternate(row: int) -> Run:
    kind = (RunKind.GRAFT, RunKind.COPY, RunKind.ADD, RunKind.ZERO)[row % 4]
    used = inputs_used(kind, 3)
    sources = (row, 2999 - row, 2999 - row)
    return Run(kind, row, 1, tuple(sources[slot] if slot in used else -1 for slot in range(3)))


def test_rows_of_one_element_that_alternate(tmp_path: Path) -> None:
    tensors = [values(dtype, (3000,), slot) for slot, dtype in enumerate(["F32", "F16", "BF16"])]
    runs = tuple(map(alternate, range(3000)))
    check(
        tmp_path,
        [make_case(tmp_path / "in", "bias", Operation.TRANSFER, tensors, "BF16", runs=runs)],
        threads=2,
    )


@settings(max_examples=25)
@given(st.data())
def test_any_task(data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(list(OPERATIONS)))
    count = OPERATIONS[operation]
    shape = data.draw(st.sampled_from([(), (1,), (5, 3), (2, 300_000), (700, 401), (3, 2, 5)]))
    mix = [data.draw(st.sampled_from(list(DTYPES))) for _ in range(count + 1)]
    tensors = [values(dtype, shape, slot) for slot, dtype in enumerate(mix[:-1])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = make_case(
            *(folder / "in", "t", operation, tensors, mix[-1]),
            alpha=data.draw(st.floats(-2, 2)),
        )
        check(
            folder,
            [case],
            threads=data.draw(st.integers(1, 4)),
            chunk_elements=BLOCK_ELEMENTS * data.draw(st.integers(1, 3)),
        )


# What is known of a difference.


def test_norms_samples_and_base_checksums(tmp_path: Path) -> None:
    elements = 2 * BLOCK_ELEMENTS + 5
    finetuned, base = values("BF16", (elements,), 1), values("F16", (elements,), 2)
    sample = (0, 1, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, elements - 1)
    case = make_case(
        *(tmp_path / "in", "w", Operation.SUBTRACT, (finetuned, base), "BF16"), sample=sample
    )
    result = check(tmp_path, [case], threads=2)["w"]
    delta = finetuned.double() - base.double()
    assert result.delta_norm == pytest.approx(float(delta.norm()), rel=1e-8)
    assert result.base_norm == pytest.approx(float(base.double().norm()), rel=1e-8)
    assert result.input_checksum == block_checksum(base)
    assert result.samples == tuple((index, float(base[index])) for index in sample)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("roles", [("BF16", "BF16"), ("F32", "F16"), ("F16", "F64")])
def test_elements_that_do_not_come_back_are_counted(
    tmp_path: Path, roles: tuple[str, str], stored: str
) -> None:
    finetuned, base = (values(dtype, (300_000,), slot) for slot, dtype in enumerate(roles))
    case = make_case(tmp_path / "in", "w", Operation.SUBTRACT, (finetuned, base), stored)
    result = check(tmp_path, [case], threads=2)["w"]
    back = (case.expected.double() + base.double()).to(finetuned.dtype)
    assert result.inexact == int((to_bits(back) != to_bits(finetuned)).sum())
    assert stored != "BF16" or result.inexact > 0


@pytest.mark.parametrize(
    "roles", [("BF16", "BF16"), ("F32", "F32"), ("F64", "F64"), ("BF16", "F32")]
)
def test_elements_that_are_the_same_are_counted(tmp_path: Path, roles: tuple[str, str]) -> None:
    finetuned = values(roles[0], (300_000,), 0)
    finetuned[:2] = torch.tensor([0.0, -0.0])
    base = finetuned.clone().to(DTYPES[roles[1]])
    base[:2] = torch.tensor([-0.0, -0.0])
    base[7::3] += 1
    case = make_case(tmp_path / "in", "w", Operation.SUBTRACT, (finetuned, base), "BF16")
    found = check(tmp_path, [case], threads=2)["w"].unchanged
    if roles[0] == roles[1]:  # bit for bit: −0.0 is not 0.0
        assert found == int((to_bits(finetuned) == to_bits(base)).sum()) > 190_000
    else:
        assert found == int((finetuned.double() == base.double()).sum()) > 190_000


def test_a_difference_of_rows(tmp_path: Path) -> None:
    case = row_case(tmp_path / "in", Operation.SUBTRACT, ("BF16", "F32"), "F16")
    result = check(tmp_path, [case], threads=2)["rows"]
    finetuned, base = case.tensors
    inexact, squares, unchanged, known = 0, 0.0, 0, dict(result.samples)
    for run in case.task.runs:
        if run.kind is RunKind.ADD:
            ours = finetuned[run.rows[0] : run.rows[0] + run.count]
            inexact += int((to_bits(ours.half().bfloat16()) != to_bits(ours)).sum())
        if run.kind is not RunKind.GRAFT:
            continue
        ours = finetuned[run.rows[0] : run.rows[0] + run.count]
        theirs = base[run.rows[1] : run.rows[1] + run.count].double()
        delta = ours.double() - theirs
        back = (delta.half().double() + theirs).bfloat16()
        inexact += int((to_bits(back) != to_bits(ours)).sum())
        squares += float((delta**2).sum())
        unchanged += int((delta == 0).sum())
        for index in case.task.sample:
            row, column = divmod(index - run.start * WIDTH, WIDTH)
            if 0 <= row < run.count:
                assert known.pop(index) == float(theirs[row, column])
    assert known == {}
    assert result.inexact == inexact > 0
    assert result.unchanged == unchanged
    assert result.delta_norm == pytest.approx(math.sqrt(squares), rel=1e-8)
    assert result.input_checksum is None


def test_minus_zero_that_is_lost_is_counted(tmp_path: Path) -> None:
    finetuned = torch.tensor([-0.0, 0.0, 1.0])
    case = make_case(
        *(tmp_path / "in", "w", Operation.SUBTRACT, (finetuned, torch.zeros(3)), "F64")
    )
    assert check(tmp_path, [case])["w"].inexact == 1


def test_norms_that_overflow_are_infinite(tmp_path: Path) -> None:
    base = torch.zeros(BLOCK_ELEMENTS + 1, dtype=torch.float64)
    finetuned = base.clone()
    finetuned[0] = finetuned[-1] = 1.2e154  # its square fits into float64, two of them do not
    case = make_case(tmp_path / "in", "w", Operation.SUBTRACT, (finetuned, base), "F64")
    assert check(tmp_path, [case])["w"].delta_norm == math.inf


def test_only_a_difference_has_base_s_checksum(tmp_path: Path) -> None:
    tensors = [values("BF16", (5,), slot) for slot in range(3)]
    cases = [
        make_case(tmp_path / "in", "transfer", Operation.TRANSFER, tensors, "BF16"),
        make_case(tmp_path / "in", "apply", Operation.APPLY, tensors[:2], "BF16"),
    ]
    for result in check(tmp_path, cases).values():
        assert result.input_checksum is None
        assert result.samples == ()


def test_a_digest_writes_nothing(tmp_path: Path) -> None:
    tensor = values("F16", (2 * BLOCK_ELEMENTS + 3,), 0)
    case = make_case(
        *(tmp_path / "in", "w", Operation.DIGEST, (tensor,), "F16"),
        shard=None,
        runs=whole(RunKind.GRAFT, 1),
    )
    results = execute(tmp_path, plan_of(case.task), threads=2)
    assert results["w"].checksum == block_checksum(tensor)
    assert load(tmp_path) == {}


# The same whatever the threads and chunks.


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of every operation over two shards, with tensors of several blocks."""
    folder = tmp_path_factory.mktemp("mixed")
    large = (3 * BLOCK_ELEMENTS + 1,)
    tasks = []
    for operation, count in OPERATIONS.items():
        tensors = [values(dtype, large, slot) for slot, dtype in enumerate(["BF16", "F16", "F32"])]
        name = operation.value
        tasks.append(
            make_case(
                *(folder, name, operation, tensors[:count], "BF16"),
                alpha=0.1,
                shard="b" if count == 2 else "a",
                sample=tuple(range(0, large[0], 9973)),
            ).task
        )
    rows = row_case(folder, Operation.SUBTRACT, ("BF16", "F16"), "F16").task
    return plan_of(*tasks, replace(rows, shard="b"))


@pytest.fixture(scope="module")
def reference(
    mixed: Plan, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Mapping[str, TensorResult], Mapping[str, bytes]]:
    folder = tmp_path_factory.mktemp("reference")
    return execute(folder, mixed, threads=1), contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@settings(max_examples=14)
@given(st.integers(1, 4), st.integers(1, 3))
def test_threads_and_chunks_change_nothing(
    mixed: Plan,
    reference: tuple[Mapping[str, TensorResult], Mapping[str, bytes]],
    threads: int,
    blocks: int,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = execute(folder, mixed, threads=threads, chunk_elements=blocks * BLOCK_ELEMENTS)
        assert (results, contents(folder)) == reference


# NaN, infinity, overflow.


@cache
def clean(slot: int) -> Tensor:
    return values("BF16", (5, BLOCK_ELEMENTS // 2), slot)


def spoiled(folder: Path, spoil: Mapping[tuple[str, int], Mapping[int, float]]) -> Plan:
    """Three tensors to transfer; `spoil` gives bad values by tensor and role."""
    tasks = []
    for name in ("a", "b", "c"):
        tensors = [clean(slot).clone() for slot in range(3)]
        for slot, tensor in enumerate(tensors):
            for index, value in spoil.get((name, slot), {}).items():
                tensor.view(-1)[index] = value
        tasks.append(make_case(folder, name, Operation.TRANSFER, tensors, "BF16").task)
    return plan_of(*tasks)


BAD = [
    ({("b", 0): {BLOCK_ELEMENTS + 3: math.nan}}, "b", "finetuned", (2, 3), "NaN in finetuned"),
    ({("c", 1): {7: math.inf}}, "c", "base", (0, 7), "infinity in base"),
    (
        {("a", 2): {-1: -math.inf}},
        "a",
        "target",
        (4, BLOCK_ELEMENTS // 2 - 1),
        "infinity in target",
    ),
    ({("b", 2): {9: 3e38}, ("b", 0): {9: 3e38}}, "b", "output", (0, 9), "overflows BF16"),
    # The first element of the first tensor, whatever else is wrong.
    (
        {
            ("c", 0): {0: math.nan},
            ("b", 0): {2 * BLOCK_ELEMENTS: math.inf, 5: math.nan},
            ("b", 1): {4: math.inf, 2 * BLOCK_ELEMENTS + 1: math.nan},
            ("b", 2): {5: math.inf},
        },
        "b",
        "base",
        (0, 4),
        "infinity in base",
    ),
    (
        {("a", 0): {3: 3e38, 9: math.nan}, ("a", 2): {3: 3e38}},
        "a",
        "output",
        (0, 3),
        "overflows BF16",
    ),
]


@pytest.mark.parametrize(("spoil", "tensor", "role", "index", "words"), BAD)
def test_bad_values_are_named_the_same_every_time(
    tmp_path: Path, spoil: Any, tensor: str, role: str, index: tuple[int, ...], words: str
) -> None:
    plan = spoiled(tmp_path / "in", spoil)
    for threads, blocks in ((1, 1), (4, 1), (3, 2)):
        with pytest.raises(NonFiniteError, match=words) as caught:
            execute(tmp_path, plan, threads=threads, chunk_elements=blocks * BLOCK_ELEMENTS)
        error = caught.value
        assert (error.tensor, error.role, error.index) == (tensor, role, index)
        assert str(list(index)) in str(error)
        assert "--allow-nonfinite" in str(error)
        assert "\n" not in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bad_values_are_let_through_when_they_are_allowed(tmp_path: Path) -> None:
    spoil = {("a", 0): {1: math.nan}, ("b", 2): {2: math.inf, 3: 3e38}, ("b", 0): {3: 3e38}}
    execute(tmp_path, spoiled(tmp_path / "in", spoil), threads=2, allow_nonfinite=True)
    found = load(tmp_path)
    assert math.isnan(found["a"].view(-1)[1])
    assert found["b"].view(-1)[2:4].tolist() == [math.inf, math.inf]
    assert torch.isfinite(found["c"]).all()


@pytest.mark.parametrize(
    ("out", "value", "fits"),
    [("F16", 65504.0, True), ("F16", 65520.0, False), ("F32", 3.4e38, True), ("F32", 4e38, False)],
)
def test_an_output_overflows_where_its_dtype_does(
    tmp_path: Path, out: str, value: float, fits: bool
) -> None:
    tensors = [torch.zeros(3, dtype=torch.float64) for _ in range(3)]
    tensors[2][1] = value
    case = make_case(tmp_path / "in", "w", Operation.TRANSFER, tensors, out)
    if fits:
        check(tmp_path, [case])
    else:
        with pytest.raises(NonFiniteError, match=rf"overflows {out} in the output at \[1\]"):
            execute(tmp_path, plan_of(case.task))


def test_a_difference_too_large_for_its_dtype_is_an_overflow(tmp_path: Path) -> None:
    tensors = torch.tensor([0.0, 60000.0]).half(), torch.tensor([0.0, -60000.0]).half()
    case = make_case(tmp_path / "in", "w", Operation.SUBTRACT, tensors, "F16")
    words = r"overflows F16 in the output at \[1\]; give a wider --diff-dtype, or --allow"
    with pytest.raises(NonFiniteError, match=words):
        execute(tmp_path, plan_of(case.task))


def test_a_scalar_has_no_index(tmp_path: Path) -> None:
    tensors = [torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(1.0)]
    case = make_case(tmp_path / "in", "w", Operation.TRANSFER, tensors, "F32")
    with pytest.raises(NonFiniteError, match=r"NaN in base at \[\]") as caught:
        execute(tmp_path, plan_of(case.task))
    assert caught.value.index == ()


@pytest.mark.parametrize(("slot", "row"), [(0, 0), (1, 61), (2, 72), (0, 20), (1, 31), (2, 42)])
def test_a_bad_row_is_named_by_its_place_in_its_own_input(
    tmp_path: Path, slot: int, row: int
) -> None:
    runs = (
        Run(RunKind.COPY, 0, 1, (-1, -1, 0)),
        Run(RunKind.GRAFT, 1, 3, (0, 60, 70)),
        Run(RunKind.ZERO, 4, 1, (-1, -1, -1)),
        Run(RunKind.GRAFT, 5, 3, (20, 30, 40)),
    )
    tensors = [values("BF16", (80, 11), number) for number in range(3)]
    tensors[slot][row, 8] = math.nan
    case = make_case(
        *(tmp_path / "in", "w", Operation.TRANSFER, tensors, "BF16"), runs=runs, shape=(8, 11)
    )
    with pytest.raises(NonFiniteError) as caught:
        execute(tmp_path, plan_of(case.task), threads=2)
    role = ("finetuned", "base", "target")[slot]
    assert (caught.value.role, caught.value.index) == (role, (row, 8))


def test_a_row_that_is_taken_whole_must_be_finite_and_one_that_is_not_need_not(
    tmp_path: Path,
) -> None:
    finetuned, base, target = (torch.ones(4, 3) for _ in range(3))
    target[3, 1] = finetuned[3, 2] = math.nan
    runs = (Run(RunKind.GRAFT, 0, 2, (0, 0, 0)), Run(RunKind.COPY, 2, 1, (-1, -1, 2)))
    tensors = (finetuned, base, target)
    fine = make_case(
        *(tmp_path / "in", "fine", Operation.TRANSFER, tensors, "F32"), runs=runs, shape=(3, 3)
    )
    execute(tmp_path / "fine", plan_of(fine.task))
    for kind, rows, said in (
        (RunKind.ADD, (3, -1, -1), r"NaN in finetuned at \[3, 2\]"),
        (RunKind.COPY, (-1, -1, 3), r"NaN in target at \[3, 1\]"),
    ):
        bad = make_case(
            *(tmp_path / "in", "bad", Operation.TRANSFER, tensors, "F32"),
            runs=(*runs, Run(kind, 3, 1, rows)),
            shape=(4, 3),
        )
        with pytest.raises(NonFiniteError, match=said):
            execute(tmp_path / "bad", plan_of(bad.task))


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize(("value", "said"), [(math.nan, "NaN"), (-math.inf, "infinity")])
def test_a_copy_must_be_finite_unless_it_is_allowed(
    tmp_path: Path, out: str, value: float, said: str
) -> None:
    tensor = torch.tensor([1.0, value, -0.0])
    case = make_case(tmp_path / "in", "w", Operation.COPY, [tensor], out)
    with pytest.raises(NonFiniteError, match=rf"^w: {said} in target at \[1\]"):
        execute(tmp_path, plan_of(case.task))
    execute(tmp_path, plan_of(case.task), allow_nonfinite=True)
    assert torch.equal(load(tmp_path)["w"].isfinite(), tensor.isfinite())


def test_a_copy_that_overflows_its_new_dtype_is_found(tmp_path: Path) -> None:
    case = make_case(
        *(tmp_path / "in", "bad", Operation.COPY, [torch.tensor([65504.0, 70000.0])], "F16")
    )
    words = r"overflows F16 in the output at \[1\]; give a wider --out-dtype, or --allow"
    with pytest.raises(NonFiniteError, match=words):
        execute(tmp_path / "bad", plan_of(case.task))


# Comparing.


def test_integers_must_agree(tmp_path: Path) -> None:
    ours = torch.arange(2 * BLOCK_ELEMENTS)
    theirs = ours.clone()
    same = make_case(
        *(tmp_path / "in", "same", Operation.COMPARE, (ours, theirs), "I64"), shard=None
    )
    theirs[-1] += 1
    other = make_case(
        *(tmp_path / "in", "other", Operation.COMPARE, (ours, theirs), "I64"), shard=None
    )
    execute(tmp_path / "same", plan_of(same.task), threads=2)
    for threads in (1, 4):
        with pytest.raises(
            MatchError, match="other has different I64 values in finetuned and base"
        ) as caught:
            execute(tmp_path, plan_of(same.task, other.task), threads=threads)
        assert caught.value.where == str(other.task.inputs[0].shard.path)


# Failures, and what they leave.


@pytest.fixture
def large(tmp_path: Path) -> Plan:
    """A plan that takes seconds: one tensor read again and again."""
    tensor = torch.zeros(8 * BLOCK_ELEMENTS, dtype=torch.float64)
    case = make_case(
        *(tmp_path / "in", "w", Operation.DIGEST, (tensor,), "F64"),
        shard=None,
        runs=whole(RunKind.GRAFT, 1),
    )
    return plan_of(*([case.task] * 1000))


@pytest.fixture
def _leaves_nothing_running() -> Iterator[None]:
    threads, files = threading.enumerate(), open_files()
    yield
    assert threading.enumerate() == threads
    assert open_files() == files


@pytest.mark.usefixtures("_leaves_nothing_running")
@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_exception_in_the_caller_s_thread_ends_the_workers(
    tmp_path: Path, large: Plan, error: type[BaseException]
) -> None:
    def progress(done: int, total: int) -> None:
        assert done < total
        raise error

    with pytest.raises(error):
        execute(tmp_path, large, threads=3, progress=progress)
    assert {path.name for path in tmp_path.iterdir()} <= {"in", f".out.partial-{JOB[:12]}"}


@pytest.mark.usefixtures("_leaves_nothing_running")
def test_a_thread_that_cannot_start_ends_the_others(
    tmp_path: Path, large: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, []

    def start_twice(thread: threading.Thread) -> None:
        if thread.daemon:
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_twice)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        execute(tmp_path, large, threads=4)
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.usefixtures("_leaves_nothing_running")
def test_a_failure_in_a_worker_ends_the_others_and_closes_every_file(tmp_path: Path) -> None:
    plan = spoiled(tmp_path / "in", {("b", 1): {0: math.nan}})
    with pytest.raises(NonFiniteError) as caught:
        execute(tmp_path, plan, threads=4)
    assert open_files_of(tmp_path) == []  # even while the exception is kept
    del caught


def open_files_of(folder: Path) -> list[str]:
    found = []
    for link in Path("/dev/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except OSError:
            continue
    return [name for name in found if name.startswith(str(folder))]


@pytest.mark.usefixtures("_leaves_nothing_running")
def test_an_allocation_that_fails_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(fd: int, size: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(shard_writer, "allocate", allocate)
    plan = spoiled(tmp_path / "in", {})
    with pytest.raises(DiskSpaceError, match="the disk is full"):
        execute(tmp_path, plan, threads=3)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.usefixtures("_leaves_nothing_running")
def test_an_allocation_that_fails_for_empty_tensors_alone_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path / "in", "e", Operation.COPY, [torch.empty(0)], "F32")

    def allocate(fd: int, size: int) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(shard_writer, "allocate", allocate)
    with pytest.raises(OutputError, match="Input/output error"):
        execute(tmp_path, plan_of(case.task))


@pytest.mark.usefixtures("_leaves_nothing_running")
@pytest.mark.parametrize("how", ["touched", "shortened", "removed"])
def test_an_input_that_changed_since_the_plan_is_refused(tmp_path: Path, how: str) -> None:
    plan = spoiled(tmp_path / "in", {})
    path = plan.inputs[4].path
    if how == "touched":
        os.utime(path, ns=(0, 0))
    elif how == "shortened":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    with pytest.raises(InputChangedError, match=path.name):
        execute(tmp_path, plan, threads=2)
    # What only vanished may come back; what changed makes another job.
    kept = [f".out.partial-{JOB[:12]}"] if how == "removed" else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "in"]


def test_an_input_that_changes_during_the_run_is_refused(tmp_path: Path) -> None:
    plan = spoiled(tmp_path / "in", {})

    def progress(done: int, total: int) -> None:
        if done == total:
            os.utime(plan.inputs[0].path, ns=(0, 0))

    with pytest.raises(InputChangedError, match="changed while it was read"):
        execute(tmp_path, plan, threads=2, progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_many_shards_need_few_descriptors(tmp_path: Path) -> None:
    tensors = [torch.ones(3), torch.zeros(3), torch.ones(3)]
    cases = [
        make_case(
            tmp_path / "in", f"t{i:03d}", Operation.TRANSFER, tensors, "F32", shard=f"{i:03d}"
        )
        for i in range(80)
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(link.name) for link in Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 50, hard))
    try:
        check(tmp_path, cases, threads=4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# The processor's settings, and progress.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_subnormals_are_computed_where_the_caller_s_thread_flushes_them(
    tmp_path: Path, operation: Operation, dtype: str
) -> None:
    integers = to_bits(torch.empty(0, dtype=DTYPES[dtype])).dtype
    tensors = [
        torch.arange(start, start + 40).to(integers).view(DTYPES[dtype]) for start in (9, 0, 5)
    ]
    case = make_case(tmp_path / "in", "t", operation, tensors[: OPERATIONS[operation]], dtype)
    expected = case.expected
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor always computes with subnormals")
    try:
        results = execute(tmp_path, plan_of(case.task), threads=2)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(load(tmp_path)["t"], expected)
    assert results["t"].inexact == 0


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(tmp_path: Path, threads: int) -> None:
    with pytest.raises(OptionError, match=f"^--threads: {threads} is less than one"):
        execute(tmp_path, plan_of(), threads=threads)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["gpu", "", "meta", "cuda:99"])
def test_a_device_that_cannot_compute_is_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(OptionError, match=r"^--device: ") as caught:
        execute(tmp_path, plan_of(), device=device)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    plan = spoiled(tmp_path / "in", {})
    calls: list[tuple[int, int]] = []
    execute(tmp_path, plan, threads=2, progress=lambda done, total: calls.append((done, total)))
    total = plan.bytes_to_read + plan.bytes_to_write
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    assert {of for _, of in calls} == {total}


def test_there_is_a_thread_a_processor_and_eight_at_most() -> None:
    assert 1 <= default_threads() <= 8
