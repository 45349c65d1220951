"""The pipeline of a device against the oracle and the CPU's workers, bit for bit.

Every test runs on a device of this machine's own memory, and on a GPU where there is one.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffxfer.errors import DeviceError, DiffxferError, MatchError, NonFiniteError, OptionError
from diffxfer.streaming import cuda, device
from diffxfer.streaming.device_batch import WORK_BYTES, buffer_bytes, device_batches
from diffxfer.streaming.pipeline import SLOTS
from diffxfer.streaming.plan import (
    BLOCK_ELEMENTS,
    Operation,
    Plan,
    RunKind,
    TensorTask,
    chunks,
    whole,
)
from tests.helpers import DTYPES, same_bits, save_shard, to_bits, values
from tests.streaming import test_engine as engine
from tests.streaming.host_device import HostDevice, HostDone
from tests.streaming.test_engine import OPERATIONS, execute, load, make_case, plan_of, row_case

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from diffxfer.streaming.statistics import TensorResult

ARITHMETIC = [operation for operation in OPERATIONS if operation is not Operation.COPY]
REASON = "PyTorch finds no GPU"


@pytest.fixture(
    params=[
        "host",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON)
        ),
    ],
    autouse=True,
)
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[HostDevice]:
    """Devices that were made, in order; none where a GPU is used."""
    devices: list[HostDevice] = []

    def make(name: str) -> HostDevice:
        devices.append(HostDevice(name))
        return devices[-1]

    if request.param == "host":
        monkeypatch.setattr(device, "_gpus", lambda: 1)
        monkeypatch.setattr(cuda, "Cuda", make)
    return devices


def memory_for(plan: Plan, threads: int, blocks: int) -> int:
    """As much as device_batches of so many blocks take."""
    elements = blocks * BLOCK_ELEMENTS
    return threads * SLOTS * sum(buffer_bytes(plan, elements)) + elements * WORK_BYTES


def on_device(
    folder: Path, plan: Plan, *, threads: int = 2, blocks: int = 1, **options: Any
) -> dict[str, TensorResult]:
    memory = memory_for(plan, threads, blocks)
    return execute(folder, plan, threads=threads, device="cuda:0", device_memory=memory, **options)


def check(folder: Path, plan: Plan, **options: Any) -> dict[str, TensorResult]:
    """The same bytes and the same results as the CPU's."""
    known = {key: value for key, value in options.items() if key == "allow_nonfinite"}
    expected = execute(folder / "cpu", plan, threads=1, **known)
    found = on_device(folder / "device", plan, **options)
    assert found == expected
    assert engine.contents(folder / "device") == engine.contents(folder / "cpu")
    return found


# The bits.


@pytest.mark.parametrize("alpha", [1.0, -1.3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_mix_of_dtypes(tmp_path: Path, operation: Operation, alpha: float) -> None:
    cases = []
    for number, mix in enumerate(product(DTYPES, repeat=OPERATIONS[operation] + 1)):
        # With three inputs 37 of 256 mixes; another alpha changes no path of a mix.
        if number % 7 and (len(mix) == 4 or alpha != 1.0):
            continue
        tensors = [values(dtype, (7, 61), number + slot) for slot, dtype in enumerate(mix[:-1])]
        name = f"{number:03d}"
        cases.append(make_case(tmp_path / "in", name, operation, tensors, mix[-1], alpha=alpha))
    check(tmp_path, plan_of(*(case.task for case in cases)))
    written = load(tmp_path / "device")
    for case in cases:
        assert same_bits(written[case.task.name], case.expected), case.task.inputs


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("operation", ARITHMETIC)
def test_large_tensors_and_small_ones_among_them(
    tmp_path: Path, operation: Operation, blocks: int, made: list[HostDevice]
) -> None:
    sizes = [5, 3 * BLOCK_ELEMENTS + 17, 7, 7, 7, BLOCK_ELEMENTS, 0, 2 * BLOCK_ELEMENTS, 5]
    cases = []
    for number, elements in enumerate(sizes):
        tensors = [
            values("BF16", (elements,), number + slot) for slot in range(OPERATIONS[operation])
        ]
        known = {"sample": tuple(range(0, elements, 997))}
        more = known if operation is Operation.SUBTRACT else {}
        cases.append(make_case(tmp_path / "in", f"t{number}", operation, tensors, "BF16", **more))
    results = check(tmp_path, plan_of(*(case.task for case in cases)), blocks=blocks, threads=3)
    written = load(tmp_path / "device")
    for case in cases:
        assert same_bits(written[case.task.name], case.expected)
    if operation is Operation.SUBTRACT:
        assert len(results["t1"].samples) > 700
    for one in made:
        assert one.closed
        assert one.submitted < sum(1 for _ in chunks(plan_of(*(case.task for case in cases))))


@pytest.mark.parametrize("mix", [("BF16", "BF16", "BF16"), ("F16", "F64", "F32")])
@pytest.mark.parametrize("operation", ARITHMETIC)
def test_rows_that_are_treated_differently(
    tmp_path: Path, operation: Operation, mix: Sequence[str]
) -> None:
    case = row_case(tmp_path / "in", operation, mix, "BF16")
    check(tmp_path, plan_of(case.task), blocks=2)
    assert same_bits(load(tmp_path / "device")["rows"], case.expected)


def test_every_pattern_of_16_bits_when_all_is_allowed(tmp_path: Path) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    cases = []
    for dtype, out in product(("BF16", "F16"), DTYPES):
        roles = (patterns.roll(99), patterns.flip(0), patterns)
        tensors = [role.view(DTYPES[dtype]) for role in roles]
        name = f"{dtype}-{out}"
        cases.append(make_case(tmp_path / "in", name, Operation.TRANSFER, tensors, out, alpha=0.1))
    on_device(tmp_path, plan_of(*(case.task for case in cases)), allow_nonfinite=True)
    written = load(tmp_path)
    for case in cases:
        got, expected = written[case.task.name], case.expected
        numbers = ~torch.isnan(expected)
        assert torch.equal(torch.isnan(got), ~numbers)
        assert torch.equal(to_bits(got)[numbers], to_bits(expected)[numbers])


def random_task(data: st.DataObject, folder: Path, name: str) -> TensorTask:
    operation = data.draw(st.sampled_from(list(OPERATIONS)))
    count = OPERATIONS[operation]
    # Few kinds, so that neighbours often come together.
    mix = data.draw(st.sampled_from([["BF16"] * 4, ["F32", "F16", "BF16", "F32"]]))
    shard = data.draw(st.sampled_from(["a", "b"]))
    if operation is not Operation.COPY and data.draw(st.booleans()):
        rows = row_case(folder / name, operation, mix, mix[-1]).task
        return replace(rows, name=name, shard=shard)
    shape = data.draw(st.sampled_from([(), (3,), (3,), (0, 2), (2, 300_000), (700, 401)]))
    tensors = [values(dtype, shape, slot) for slot, dtype in enumerate(mix[:count])]
    alpha = data.draw(st.sampled_from([1.0, 0.1]))
    return make_case(*(folder, name, operation, tensors, mix[-1]), alpha=alpha, shard=shard).task


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_plan(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = [
            random_task(data, folder / "in", f"t{n}") for n in range(data.draw(st.integers(1, 6)))
        ]
        check(
            folder,
            plan_of(*tasks),
            threads=data.draw(st.integers(1, 3)),
            blocks=data.draw(st.sampled_from([1, 2, 4])),
        )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 5, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 4 * BLOCK_ELEMENTS]),
            st.sampled_from([Operation.TRANSFER, Operation.TRANSFER, Operation.COPY]),
            st.sampled_from([1.0, 1.0, 0.5]),
        )
    ),
    st.integers(1, 4),
    st.sets(st.integers(0, 12)),
)
def test_slabs_are_neighbours_that_are_alike(
    drawn: list[tuple[int, Operation, float]], blocks: int, done: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        spec = save_shard(Path(name) / "s.safetensors", {"t": torch.zeros(1)})["t"]
    tasks = [
        TensorTask(
            *(f"t{number:02d}", operation, (spec,) * OPERATIONS[operation], "F32", (size,), alpha),
            runs=whole(
                RunKind.GRAFT if operation is Operation.TRANSFER else RunKind.COPY,
                OPERATIONS[operation],
            ),
            shard="a",
        )
        for number, (size, operation, alpha) in enumerate(drawn)
    ]
    plan = plan_of(*tasks)
    found = list(device_batches(chunks(plan, done=done), plan, blocks * BLOCK_ELEMENTS))
    assert [chunk for batch in found for chunk in batch] == list(chunks(plan, done=done))
    for batch in found:
        assert sum(chunk.count for chunk in batch) <= blocks * BLOCK_ELEMENTS
        theirs = [plan.tasks[chunk.task] for chunk in batch]
        assert len({(task.operation, task.alpha) for task in theirs}) == 1
        assert len(batch) == 1 or theirs[0].operation is Operation.TRANSFER
        places = [task.start + 4 * chunk.start for task, chunk in zip(theirs, batch, strict=True)]
        ends = [place + 4 * chunk.count for place, chunk in zip(places, batch, strict=True)]
        assert places[1:] == ends[:-1]
    if not done and all(alpha == 1.0 for *_, alpha in drawn):  # they are as large as can be
        for left, right in pairwise(found):
            operations = {plan.tasks[chunk.task].operation for chunk in (*left, *right)}
            if operations == {Operation.TRANSFER}:
                assert sum(c.count for c in (*left, right[0])) > blocks * BLOCK_ELEMENTS


def test_neighbours_are_read_from_their_own_files(tmp_path: Path) -> None:
    # b lies in the second file where a in the first one ends.
    files = [
        save_shard(
            tmp_path / f"{name}.safetensors",
            {"a": values("F32", (40,), seed), "b": values("F32", (40,), seed + 1)},
        )
        for seed, name in ((1, "one"), (3, "other"))
    ]
    assert files[0]["a"].start + 160 == files[1]["b"].start
    tasks = [
        TensorTask(
            *(name, Operation.APPLY, (spec, spec), "F32", (40,)),
            runs=whole(RunKind.GRAFT, 2),
            shard="model",
        )
        for name, spec in (("a", files[0]["a"]), ("b", files[1]["b"]))
    ]
    check(tmp_path, plan_of(*tasks))


# What goes wrong.


def failure(run: Callable[[], object]) -> DiffxferError:
    with pytest.raises(DiffxferError) as caught:
        run()
    return caught.value


@pytest.mark.parametrize("spoil", [bad[0] for bad in engine.BAD])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_that_is_not_finite_is_named(
    tmp_path: Path, spoil: Mapping[tuple[str, int], Mapping[int, float]], threads: int
) -> None:
    plan = engine.spoiled(tmp_path / "in", spoil)
    expected = failure(lambda: execute(tmp_path / "cpu", plan, threads=1))
    for blocks in (1, 4):
        run = lambda: on_device(tmp_path / f"d{blocks}", plan, threads=threads, blocks=blocks)  # noqa: B023, E731 called at once
        found = failure(run)
        assert isinstance(found, NonFiniteError)
        assert str(found) == str(expected)


def test_the_first_is_named_though_a_later_one_is_found_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(self: HostDevice, done: HostDone) -> None:
        if done.number == 1:
            time.sleep(0.5)  # the first batch of all comes back last
        done.synchronize()

    monkeypatch.setattr(cuda, "Cuda", HostDevice)
    monkeypatch.setattr(HostDevice, "wait", wait)
    bad = {("a", 0): {3: math.nan}, ("c", 0): {3: math.nan}, ("b", 1): {5: math.inf}}
    plan = engine.spoiled(tmp_path / "in", bad)
    assert str(failure(lambda: on_device(tmp_path, plan, threads=3))).startswith("a: NaN")


def test_a_sum_that_overflows_by_itself_is_no_failure(tmp_path: Path) -> None:
    tensors = [torch.full((9,), 1.7e308, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)]
    case = make_case(tmp_path / "in", "t", Operation.APPLY, tensors, "F64")
    check(tmp_path, plan_of(case.task))


def test_an_input_that_became_shorter_comes_after_what_is_before_it(tmp_path: Path) -> None:
    def cut(folder: Path, spoil: Mapping[Any, Any]) -> Plan:
        plan = engine.spoiled(folder, spoil)
        for path in folder.glob("b-1*"):
            size = path.stat()
            with path.open("r+b") as file:
                file.truncate(size.st_size - 100)
            shard = next(s for s in plan.inputs if s.path == path)
            changed = path.stat()
            identity = (changed.st_dev, changed.st_ino, changed.st_size, changed.st_mtime_ns)
            assert len(shard.identity) == len(identity)
            object.__setattr__(shard, "identity", identity)
        return plan

    for number, spoil in enumerate([{}, {("a", 0): {3: math.nan}}]):
        plan = cut(tmp_path / f"in{number}", spoil)
        expected = failure(lambda: execute(tmp_path / f"cpu{number}", plan, threads=1))  # noqa: B023 called at once
        for blocks in (1, 8):
            found = failure(
                lambda: on_device(tmp_path / f"d{number}-{blocks}", plan, blocks=blocks)  # noqa: B023 called at once
            )
            assert (type(found), str(found)) == (type(expected), str(expected))
    assert "NaN in finetuned" in str(found)


def test_integers_that_differ_are_refused(tmp_path: Path) -> None:
    tensors = (torch.arange(5), torch.arange(1, 6))
    case = make_case(
        *(tmp_path / "in", "i", Operation.COMPARE, tensors, "I64"),
        runs=whole(RunKind.GRAFT, 2),
        shard=None,
    )
    with pytest.raises(MatchError, match="i has different I64 values"):
        on_device(tmp_path, plan_of(case.task))


def test_a_device_that_fails_leaves_what_the_cpu_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[HostDone] = []

    def wait(self: HostDevice, done: HostDone) -> None:
        waited.append(done)
        done.synchronize()
        if len(waited) == 4:
            raise DeviceError(self.name, "CUDA error: unspecified launch failure", "try again")

    monkeypatch.setattr(cuda, "Cuda", HostDevice)
    monkeypatch.setattr(HostDevice, "wait", wait)
    plan = engine.spoiled(tmp_path / "in", {})
    expected = execute(tmp_path / "cpu", plan, threads=1)
    error = failure(lambda: on_device(tmp_path, plan, threads=1))
    assert isinstance(error, DeviceError)
    assert str(error).startswith("cuda:0: CUDA error: unspecified launch failure; try again; 33 %")
    calls: list[int] = []
    assert execute(tmp_path, plan, progress=lambda done, _: calls.append(done)) == expected
    assert calls[0] == 5 * BLOCK_ELEMENTS // 2 * 4 * 2  # a tensor: three inputs and an output
    assert engine.contents(tmp_path) == engine.contents(tmp_path / "cpu")


# Memory and time.


def test_device_memory_has_a_bound_whatever_the_model(
    tmp_path: Path, made: list[HostDevice]
) -> None:
    if not made and torch.cuda.is_available():
        pytest.skip("tests/streaming/test_cuda.py asks the GPU itself")
    for name, blocks in (("small", 1), ("large", 12)):
        tensors = [values("F32", (blocks * BLOCK_ELEMENTS,), slot) for slot in range(2)]
        case = make_case(tmp_path / name / "in", "t", Operation.SUBTRACT, tensors, "F32")
        execute(
            *(tmp_path / name, plan_of(case.task)),
            threads=1,
            device="cuda:0",
            device_memory=60_000_000,
        )
    assert made[0].allocated < made[1].allocated <= 60_000_000
    assert made[1].most_under_way == SLOTS


def test_too_little_device_memory_is_refused(tmp_path: Path) -> None:
    tensors = [values("BF16", (9,), slot) for slot in range(3)]
    plan = plan_of(make_case(tmp_path / "in", "t", Operation.TRANSFER, tensors, "BF16").task)
    least = memory_for(plan, 8, 1)
    match = re.escape(
        f"--device-memory: {least - 1:,} bytes are too few: --threads 8 needs {least:,};"
        " give more, or fewer --threads"
    )
    with pytest.raises(OptionError, match=match):
        execute(tmp_path, plan, threads=8, device="cuda:0", device_memory=least - 1)
    execute(tmp_path, plan, threads=8, device="cuda:0", device_memory=least)
