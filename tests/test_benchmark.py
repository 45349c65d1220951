"""The benchmark of the examples runs, and its figures fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parent.parent


def measure(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    program = [sys.executable, str(ROOT / "examples" / "benchmark.py"), str(folder)]
    common = ["--shape", "tiny", "--runs", "1", "--mergekit", "none", "--json"]
    done = subprocess.run([*program, *common, *options], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["results"]["tiny"]
    return found


def test_a_verb_beside_its_floor(tmp_path: Path) -> None:
    row = measure(tmp_path, ["--what", "transfer"])["transfer"]
    assert row["loop"] > 0 < row["floor"]
    assert row["wall"] > row["loop"]
    assert row["peak"] > 50, "less than torch takes: another process was measured"
    model = 2 * 106_816
    assert 4 * model < row["moved"] < 4.1 * model
    assert not list(tmp_path.iterdir())


def test_headers_alone_are_enough_for_a_plan(tmp_path: Path) -> None:
    row = measure(tmp_path, ["--what", "dry-run", "--sparse", "--keep"])["dry-run"]
    assert "loop" not in row
    model = tmp_path / "diffxfer-tiny-sparse" / "base" / "model.safetensors"
    assert model.stat().st_blocks * 512 < model.stat().st_size
    assert not (tmp_path / "diffxfer-tiny-sparse" / "out").exists()
