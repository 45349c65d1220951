"""`--device` on the command line: the same output, the messages, and what is refused.

A device in this machine's memory takes the place of a GPU; see `tests/streaming/test_cuda.py`.
"""

from __future__ import annotations

import json

import pytest

from diffxfer.streaming import cuda, device
from tests import tiny
from tests.streaming.host_device import HostDevice
from tests.tiny import OPERANDS, World


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[HostDevice]:
    devices: list[HostDevice] = []

    def make(name: str) -> HostDevice:
        devices.append(HostDevice(name))
        return devices[-1]

    monkeypatch.setattr(device, "_gpus", lambda: 2)
    monkeypatch.setattr(cuda, "Cuda", make)
    return devices


@pytest.mark.parametrize("verb", OPERANDS)
def test_a_gpu_makes_the_same_folder(world: World, made: list[HostDevice], verb: str) -> None:
    assert tiny.run(*world.argv(verb)).status == 0
    expected = {path: path.read_bytes() for path in world.out.rglob("*") if path.is_file()}
    options = ("--overwrite", "--device", "cuda:1", "--device-memory", "100MB")
    outcome = tiny.run(*world.argv(verb, *options), summary=True)
    assert outcome.status == 0, outcome
    assert "device: cuda:1\n" in outcome.err
    assert {path: path.read_bytes() for path in expected} == expected
    assert [(one.name, one.closed) for one in made] == [("cuda:1", True)]
    assert made[0].submitted > 0


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_auto_says_what_it_took_and_why(
    world: World, made: list[HostDevice], dry: tuple[str, ...]
) -> None:
    argv = world.argv("transfer", "--device", "auto")
    found = json.loads(tiny.run(*argv, "--json", *dry).out)
    why = "the arithmetic takes about 0.0 s at --threads 1, a GPU about 5 s to start"
    assert (found["device"], found["device_why"]) == ("cpu", why)
    outcome = tiny.run(*argv, *(dry or ["--overwrite"]), summary=True)
    assert f"device: cpu, since {why}\n" in (outcome.out if dry else outcome.err)
    assert made == []


def test_nothing_is_said_of_a_cpu_that_was_not_chosen(world: World) -> None:
    outcome = tiny.run(*world.argv("transfer"), summary=True)
    assert outcome.status == 0
    assert "device" not in outcome.err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ["--device", "cuda:2"],
            "--device: cuda:2 does not exist: PyTorch finds 2 GPUs, cuda:0 to",
        ),
        (["--device", "tpu"], "--device: 'tpu' is unknown; give cpu, cuda, cuda:N or auto"),
        (
            ["--device-memory", "much"],
            "--device-memory: 'much' is not a size; give one such as 5GB",
        ),
        (
            ["--device", "cuda", "--device-memory", "1MB"],
            "--device-memory: 1,000,000 bytes are too few: --threads 1 needs",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    world: World, made: list[HostDevice], options: list[str], problem: str
) -> None:
    outcome = tiny.run(*world.argv("apply", *options))
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: {problem}")
    assert outcome.err.count("\n") == 1
    assert not world.out.exists()
    assert not list(world.out.parent.glob(".*"))
