"""The table of packed sizes: every row is there, and what it says about exactness is true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "examples" / "packed_sizes.py")]
    options = ["--elements", "400000", "--runs", "1", "--folder", str(tmp_path)]
    done = subprocess.run([*program, *options], capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert {len(row) for row in rows} == {8}
    found = {(row[0], row[1]): row for row in rows[2:]}
    for model in ("shipped", "light", "heavy"):
        ideal = float(found[model, "its entropy"][2])
        for name in ("diffxfer extract --pack", "its coding alone, in memory"):
            assert found[model, name][7] == "yes"
        assert float(found[model, "its coding alone, in memory"][2]) < 1.2 * ideal
        assert found[model, "diffxfer extract"][7].startswith("no")
    assert not list(tmp_path.iterdir())
