"""Running the command line in a separate process whose system calls fail: see faults.c."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE = Path(__file__).with_name("faults.c")


def compile_shim(folder: Path) -> Path:
    """The shared object; without a C compiler, or on an unsupported system, the test is skipped."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("faults need a C compiler, and Linux")
    made = folder / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl"], check=True)
    return made


@dataclass(frozen=True)
class Ended:
    """The outcome of a process, and its system calls below the folder."""

    status: int
    out: str
    err: str
    calls: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Faults:
    """Runs the command line with a fault.

    Args:
        library: the shared object.
        log: a file to count in.
    """

    library: Path
    log: Path

    def run(
        self,
        argv: Sequence[str],
        *,
        under: str,
        calls: str | None = None,
        at: int = 0,
        do: str = "",
        **options: Any,
    ) -> Ended:
        """Run it, and hit the call with the number `at`."""
        self.log.write_bytes(bytes(24))
        fault = {"FAULT_UNDER": under, "FAULT_LOG": str(self.log)}
        if calls is not None:
            fault["FAULT_CALLS"] = f" {calls} "
        if at:
            fault |= {"FAULT_AT": str(at), "FAULT_DO": do}
        done = subprocess.run(
            [sys.executable, "-m", "diffxfer", *argv],
            env={**os.environ, "LD_PRELOAD": str(self.library), **fault},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            **options,
        )
        counted = struct.unpack("<3q", self.log.read_bytes())
        return Ended(done.returncode, done.stdout, done.stderr, *counted)
