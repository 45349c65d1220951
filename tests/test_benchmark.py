"""The example benchmark runs, and its figures are consistent."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.streaming import cuda
from tests.streaming.host_device import HostDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

ROOT = Path(__file__).parent.parent


def measure(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    program = [sys.executable, str(ROOT / "examples" / "benchmark.py"), str(folder)]
    common = ["--shape", "tiny", "--runs", "1", "--mergekit", "none", "--json"]
    done = subprocess.run([*program, *common, *options], capture_output=True, text=True, check=True)
    found: dict[str, Any] = {"stderr": done.stderr, **json.loads(done.stdout)["results"]["tiny"]}
    return found


def test_a_verb_beside_its_floor(tmp_path: Path) -> None:
    row = measure(tmp_path, ["--what", "transfer"])["transfer"]
    assert row["loop"] > 0 < row["floor"]
    assert row["wall"] > row["loop"]
    assert row["peak"] > 50, "less than torch takes: another process was measured"
    model = 2 * 106_816
    assert 4 * model < row["moved"] < 4.1 * model
    assert not list(tmp_path.iterdir())


def test_comparing_beside_reading_alone(tmp_path: Path) -> None:
    row = measure(tmp_path, ["--what", "inspect"])["inspect"]
    assert row["loop"] > 0 < row["floor"]
    assert row["moved"] == 2 * 2 * 106_816


def test_the_bus_carries_what_the_floor_reads_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import benchmark_child

    devices: list[HostDevice] = []

    def make(name: str) -> HostDevice:
        devices.append(HostDevice(name))
        return devices[-1]

    monkeypatch.setattr(cuda, "Cuda", make)
    monkeypatch.setattr(benchmark_child, "_BUS_BYTES", 1000)
    for role in ("a", "b"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "model.safetensors").write_bytes(bytes(9_500))
    assert benchmark_child.bus([tmp_path / "a", tmp_path / "b"], "cuda:0")["loop_s"] > 0
    assert devices[0].submitted == 10
    assert devices[0].allocated == 4 * 3 * 1000
    assert devices[0].closed


def test_a_neighbour_that_fails_is_told_of_and_left_out(tmp_path: Path) -> None:
    neighbour = tmp_path / "neighbour"
    neighbour.write_text("#!/bin/sh\necho first\necho knows no such model\nexit 3\n")
    neighbour.chmod(0o755)
    found = measure(tmp_path, ["--what", "transfer", "--mergekit", str(neighbour), "--runs", "2"])
    assert len(found["transfer"]["runs"]["loop"]) == 2
    assert "mergekit" not in found
    (line,) = [each for each in found["stderr"].splitlines() if "mergekit" in each]
    assert line.startswith("tiny: without mergekit: ")
    assert line.endswith(" failed: knows no such model")


def test_headers_alone_are_enough_for_a_plan(tmp_path: Path) -> None:
    row = measure(tmp_path, ["--what", "dry-run", "--sparse", "--keep"])["dry-run"]
    assert "loop" not in row
    model = tmp_path / "diffxfer-tiny-sparse" / "base" / "model.safetensors"
    assert model.stat().st_blocks * 512 < model.stat().st_size
    assert not (tmp_path / "diffxfer-tiny-sparse" / "out").exists()


def test_figures_are_held_against_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    benchmark = importlib.import_module("benchmark")
    rows = {
        "transfer": benchmark.Row(wall=[2.0, 3.0], cpu=[2.0, 2.0], peak=[250.0, 250.0]),
        "mergekit": benchmark.Row(wall=[20.0, 36.0], cpu=[9.0, 9.0], peak=[9000.0, 9000.0]),
    }
    slow = {"transfer": benchmark.Row(loop=[1.5], loop_cpu=[3.0], floor=[1.0], floor_cpu=[2.0])}
    for row, moved in ((rows["transfer"], 10**9), (slow["transfer"], 10**9)):
        row.moved = moved
    rows["transfer"].loop, rows["transfer"].loop_cpu = [1.0, 1.0], [2.0, 2.0]
    rows["transfer"].floor, rows["transfer"].floor_cpu = [0.8, 0.8], [1.0, 1.0]
    slow["transfer"].wall = [4.0]
    found = {
        shape: {name: row.summary(1000) for name, row in group.items()}
        for shape, group in (("a", rows), ("b", slow))
    }
    assert list(benchmark.notes(found)) == [
        "a transfer: 2500 µs a tensor in all, 1000.0 in the loop;"
        " loop ÷ floor by processor time 2.0",
        "a: mergekit takes 11.0 times as long as transfer",
        "b transfer: 4000 µs a tensor in all, 1500.0 in the loop;"
        " loop ÷ floor by processor time 1.5",
        "transfer: 1.0 to 1.5 s a GB, 50% apart",
    ]
