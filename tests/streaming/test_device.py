"""Which device is chosen, and the errors for devices that do not exist."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from diffxfer.errors import DeviceError, OptionError
from diffxfer.streaming import device
from diffxfer.streaming.cuda import Cuda
from diffxfer.streaming.device import Choice, check_device, choose_device
from diffxfer.streaming.plan import Operation, Plan, RunKind, TensorTask, whole


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(device, "_gpus", lambda: count)


@pytest.mark.parametrize(
    "word", ["gpu", "", "meta", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:\u0661", "cpu:0"]
)
def test_another_word_is_refused(word: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_device(word)
    assert str(caught.value) == f"--device: '{word}' is unknown; give cpu, cuda, cuda:N or auto"


@pytest.mark.parametrize(
    ("word", "count", "problem"),
    [
        (
            *("cuda", 0),
            f"cuda needs a GPU that PyTorch can use; PyTorch {torch.__version__} finds none; give"
            " cpu or auto; or check nvidia-smi, and that PyTorch is a build with CUDA",
        ),
        (
            *("cuda:9", 2),
            "cuda:9 does not exist: PyTorch finds 2 GPUs, cuda:0 to cuda:1; give one of these, cpu"
            " or auto",
        ),
        (
            *("cuda:1", 1),
            "cuda:1 does not exist: PyTorch finds 1 GPU, cuda:0; give one of these, cpu or auto",
        ),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, word: str, count: int, problem: str
) -> None:
    gpus(monkeypatch, count)
    with pytest.raises(OptionError) as caught:
        check_device(word)
    assert str(caught.value) == f"--device: {problem}"


def test_gpus_that_are_there_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    for word in ("cuda", "cuda:0", "cuda:1", "auto", "cpu"):
        check_device(word)


@pytest.mark.parametrize("word", ["cpu", "auto"])
def test_cpu_and_auto_are_checked_without_torch(word: str) -> None:
    code = (
        "import sys; from diffxfer.streaming.run import check_run_options;"
        f"check_run_options(None, {word!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@dataclass(frozen=True)
class Work:
    """A plan of one tensor."""

    operation: Operation
    elements: int

    @property
    def plan(self) -> Plan:
        inputs = {Operation.TRANSFER: 3}.get(self.operation, 2)
        task = TensorTask(
            *("t", self.operation, (), "BF16", (self.elements,)),
            runs=whole(RunKind.GRAFT, inputs),
            shard="s",
        )
        return Plan((task,), {}, ())


def test_what_is_asked_for_is_taken() -> None:
    plan = Work(Operation.TRANSFER, 1).plan
    assert choose_device("cpu", plan, 1) == Choice("cpu")
    assert choose_device("cuda", plan, 1) == Choice("cuda:0")
    assert choose_device("cuda:1", plan, 1) == Choice("cuda:1")
    # As torch writes it, which refuses this one.
    assert choose_device("cuda:01", plan, 1) == Choice("cuda:1")


@pytest.mark.parametrize(
    ("count", "work", "threads", "expected"),
    [
        (0, Work(Operation.SUBTRACT, 10**12), 1, Choice("cpu", "PyTorch finds no GPU")),
        (
            *(1, Work(Operation.TRANSFER, 8 * 10**9), 8),
            Choice(
                "cpu", "the arithmetic takes about 0.3 s at --threads 8, a GPU about 5 s to start"
            ),
        ),
        (
            *(1, Work(Operation.SUBTRACT, 40 * 10**9), 2),
            Choice(
                "cuda:0", "the arithmetic takes about 8.4 s at --threads 2, more than a GPU's start"
            ),
        ),
        (
            *(1, Work(Operation.COPY, 10**13), 2),
            Choice(
                "cpu", "the arithmetic takes about 0.0 s at --threads 2, a GPU about 5 s to start"
            ),
        ),
    ],
)
def test_auto_takes_a_gpu_where_it_can_save_more_than_it_takes_to_start(
    monkeypatch: pytest.MonkeyPatch, count: int, work: Work, threads: int, expected: Choice
) -> None:
    gpus(monkeypatch, count)
    assert choose_device("auto", work.plan, threads) == expected


@dataclass(frozen=True)
class Fails:
    """What a GPU gives to wait for that fails."""

    exc: BaseException

    def synchronize(self) -> None:
        raise self.exc


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"),
            "cuda:0: CUDA out of memory. Tried to allocate 2 GiB.; give a smaller --device-memory,"
            " or another --device such as cpu",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCompile with"),
            "cuda:0: CUDA error: out of memory; give a smaller --device-memory, or"
            " another --device such as cpu",
        ),
        (
            RuntimeError("CUDA error: unspecified launch failure\nCompile with"),
            "cuda:0: CUDA error: unspecified launch failure; run it again to continue, with"
            " --device cpu if the error persists",
        ),
    ],
)
def test_what_cuda_says_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, exc: RuntimeError, text: str
) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    gpu = Cuda("cuda:0")
    with pytest.raises(DeviceError) as caught:
        gpu.wait(Fails(exc))
    assert str(caught.value) == text
    with pytest.raises(RuntimeError, match="shape mismatch"):  # a mistake of ours
        gpu.wait(Fails(RuntimeError("shape mismatch")))
