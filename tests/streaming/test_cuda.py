"""What only a GPU can show. `test_pipeline.py` runs the pipeline's own cases on it too."""

from __future__ import annotations

import random
from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch

from diffxfer.errors import DeviceError
from diffxfer.streaming.cuda import Cuda
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Operation
from tests.helpers import DTYPES
from tests.streaming.test_engine import OPERATIONS, contents, execute, make_case, plan_of

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.streaming.plan import Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")

GIB = 1 << 30


def fresh_plan(folder: Path, blocks: int) -> Plan:
    """Random data that no other run has seen, in every dtype; the seed is in a failure's output."""
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)
    torch.manual_seed(seed)
    tasks = []
    for (operation, count), dtype, out in product(OPERATIONS.items(), DTYPES, DTYPES):
        tensors = [
            torch.randn(blocks * BLOCK_ELEMENTS + 77, dtype=torch.float64).to(DTYPES[dtype])
            for _ in range(count)
        ]
        name = f"{operation.value}-{dtype}-{out}"
        tasks.append(make_case(folder, name, operation, tensors, out, alpha=0.7).task)
    return plan_of(*tasks)


def test_fresh_random_data_in_every_dtype(tmp_path: Path) -> None:
    plan = fresh_plan(tmp_path / "in", 2)
    expected = execute(tmp_path / "cpu", plan)
    assert execute(tmp_path / "gpu", plan, device="cuda:0") == expected
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")


def test_memory_is_bounded_whatever_the_model(tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    peaks = []
    for name, blocks in (("small", 8), ("large", 96)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        tensors = [torch.randn(blocks * BLOCK_ELEMENTS).bfloat16() for _ in range(3)]
        case = make_case(tmp_path / name / "in", "t", Operation.TRANSFER, tensors, "BF16")
        execute(tmp_path / name, plan_of(case.task), device="cuda:0", threads=4)
        peaks.append(torch.cuda.max_memory_reserved())
        assert free - torch.cuda.mem_get_info()[0] < GIB
    # What torch's allocator rounds up to comes on top, and sums take a little to put together.
    assert max(peaks) <= 512_000_000 + (64 << 20)


def test_a_gpu_that_is_full_is_told_of_in_a_line(tmp_path: Path) -> None:
    tensors = [torch.randn(4 * BLOCK_ELEMENTS).bfloat16() for _ in range(3)]
    plan = plan_of(make_case(tmp_path / "in", "t", Operation.TRANSFER, tensors, "BF16").task)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        with pytest.raises(
            DeviceError, match=r"out of memory.*give a smaller --device-memory"
        ) as e:
            execute(tmp_path, plan, device="cuda:0")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "\n" not in str(e.value)


def test_memory_that_another_s_kernels_still_read_is_not_written_before_they_have() -> None:
    gpu = Cuda("cuda:0")
    count = 1 << 24
    zeros = gpu.pinned(count).zero_()
    for _ in range(3):
        theirs = torch.ones(count, dtype=torch.uint8, device="cuda:0")
        place = theirs.data_ptr()
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 28)  # type: ignore[no-untyped-call]  # torch's
        kept = theirs.clone()
        del theirs
        ours = gpu.memory(count)
        assert ours.data_ptr() == place, "torch gave other memory: this shows nothing"
        gpu.wait(gpu.submit((ours, zeros), lambda: None, (zeros, ours)))
        assert bool((kept == 1).all())
        torch.cuda.synchronize()
        del ours, kept
    gpu.close()


def test_copies_and_arithmetic_come_in_order() -> None:
    gpu = Cuda("cuda:0")
    count = 1 << 24
    here, there = gpu.pinned(count), gpu.memory(count)
    assert here.is_pinned()
    back, result = gpu.pinned(count), gpu.memory(count)
    for number in range(20):
        here.fill_(number)
        done = gpu.submit((there, here), lambda: torch.add(there, 1, out=result), (back, result))
        gpu.wait(done)
        assert bool((back == number + 1).all())
    gpu.close()
