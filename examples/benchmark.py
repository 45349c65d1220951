"""Measure extract, apply and transfer beside the machine's own limit, and beside mergekit.

$ python examples/benchmark.py /dev/shm --shape 1.2b --shape moe --mergekit ~/mk/bin/mergekit-yaml

Every verb is timed as a whole process, as a user meets it, and as a loop: the threads alone, in a
process of its own. The floor reads and writes the same bytes with as many threads and computes
nothing; on tmpfs it reserves no memory for them before, as the verbs do not. All of them take
turns, so that a noisy neighbour meets them alike: trust ratios and medians of five runs or more,
not single seconds. `--cold` drops the files from the page cache before each; that means something
on a disk only. With `--device cuda`, the bus is measured in the same run: the same bytes to the GPU
and back. The bound is the larger of bus and floor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmark_table import VERBS, notes, table

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
ROLES = {
    "extract": ("finetuned", "base"),
    "apply": ("diff", "target"),
    "transfer": ("finetuned", "base", "target"),
    "inspect": ("finetuned", "base"),
}
MERGE = """\
merge_method: linear
base_model: {target}
dtype: bfloat16
parameters: {{normalize: false}}
models:
  - {{model: {target}, parameters: {{weight: 1.0}}}}
  - {{model: {finetuned}, parameters: {{weight: 1.0}}}}
  - {{model: {base}, parameters: {{weight: -1.0}}}}
"""


@dataclass
class Row:
    """What was measured of one command, a value a run.

    Attributes:
        wall: seconds of whole processes.
        cpu: seconds of processors that they took.
        peak: MiB of memory that they took at most.
        loop: seconds of the threads alone.
        loop_cpu: seconds of processors in it.
        floor: seconds of the same bytes read and written.
        floor_cpu: seconds of processors in it.
        bus: seconds of the same bytes to a GPU and back.
        moved: how many bytes those are.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)
    loop_cpu: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    floor_cpu: list[float] = field(default_factory=list)
    bus: list[float] = field(default_factory=list)
    moved: int = 0

    def summary(self, tensors: int) -> dict[str, Any]:
        """Medians, ratios and every value.

        Args:
            tensors: how many the model has.
        """
        found: dict[str, Any] = {
            name: round(median(values), 3)
            for name, values in vars(self).items()
            if name != "moved" and values
        }
        if self.loop and self.floor:
            # Run by run: what slows down one run slows down the loop and the floor of it.
            pairs = zip(self.loop, self.floor, strict=True)
            found["loop_to_floor"] = round(median(one / other for one, other in pairs), 2)
            if self.bus:
                bounds = map(max, self.floor, self.bus)
                ratios = [one / bound for one, bound in zip(self.loop, bounds, strict=True)]
                found["loop_to_bound"] = round(median(ratios), 2)
            found["cpu_to_floor"] = round(found["loop_cpu"] / found["floor_cpu"], 2)
            found["gb_per_s"] = round(self.moved / 1e9 / median(self.loop), 2)
            found["s_per_gb"] = round(median(self.loop) / (self.moved / 1e9), 4)
            found["us_per_tensor"] = round(median(self.loop) / tensors * 1e6, 1)
        return {**found, "moved": self.moved, "tensors": tensors, "runs": vars(self)}


class RunError(Exception):
    """A command that is timed ended with an error; the text has its last line.

    Args:
        command: it.
        log: what it printed.
    """

    def __init__(self, command: list[str], log: str) -> None:
        last = next(reversed(log.strip().splitlines()), "it printed nothing")
        super().__init__(f"{' '.join(command)} failed: {last}")


class Bench:
    """One family and what is done with it.

    Args:
        folder: where everything is written.
        shape: the family's.
        given: the options.
    """

    def __init__(self, folder: Path, shape: str, given: argparse.Namespace) -> None:
        self.family = folder / f"diffxfer-{shape}{'-sparse' if given.sparse else ''}"
        self.rows: defaultdict[str, Row] = defaultdict(Row)
        self._given = given
        self._shape = shape
        self._neighbour_fails = False

    def make(self) -> int:
        """Write the family, unless an earlier run left it; returns how many tensors a model has."""
        sparse = ["--sparse"] if self._given.sparse else []
        found = self._child("make", [self.family], ["--shape", self._shape, *sparse])
        return int(found["tensors"])

    def run(self) -> None:
        """Do everything once."""
        for what in self._given.what:
            if what == "apply" and not (self.family / "diff").exists():
                self._time(self._command("extract", "diff"))
            if what == "dry-run":
                self._whole(what, [*self._command("transfer"), "--dry-run"])
            else:
                self._verb(what)
        if self._given.mergekit and "transfer" in self._given.what:
            shutil.rmtree(self.family / "diff", ignore_errors=True)  # it takes much memory
            config = self.family / "merge.yaml"
            config.write_text(MERGE.format(**{r: self.family / r for r in ROLES["transfer"]}))
            self._neighbour(config)

    def _neighbour(self, config: Path) -> None:
        """Time mergekit; where it fails, such as at an unknown architecture, go on without it."""
        if self._neighbour_fails:
            return
        try:
            self._whole("mergekit", [self._given.mergekit, str(config), str(self.family / "out")])
        except RunError as failed:
            print(f"{self._shape}: without mergekit: {failed}", file=sys.stderr)
            self._neighbour_fails = True
            self.rows.pop("mergekit", None)

    def _verb(self, verb: str) -> None:
        inputs = [self.family / role for role in ROLES[verb]]
        self._whole(verb, self._command(verb))
        row = self.rows[verb]
        threads = ["--threads", str(self._given.threads)]
        if verb != "inspect":
            threads += ["--out", str(self.family / "out")]
        device = ["--device", self._given.device]
        found = self._fresh(lambda: self._child(verb, inputs, [*threads, *device]))
        row.loop.append(found["loop_s"])
        row.loop_cpu.append(found["cpu_s"])
        row.moved = int(found["moved"])
        found = self._fresh(lambda: self._child("floor", inputs, threads))
        row.floor.append(found["loop_s"])
        row.floor_cpu.append(found["cpu_s"])
        if self._given.device != "cpu":
            row.bus.append(self._child("bus", inputs, device)["loop_s"])

    def _command(self, verb: str, out: str = "out") -> list[str]:
        inputs = [str(self.family / role) for role in ROLES[verb]]
        command = [sys.executable, "-m", "diffxfer", verb, *inputs]
        command += ["--threads", str(self._given.threads)]
        if verb == "inspect":
            return [*command, "--json"]
        device = ["--device", self._given.device]
        return [*command, "-o", str(self.family / out), "--quiet", *device]

    def _whole(self, name: str, command: list[str]) -> None:
        wall, usage = self._fresh(lambda: self._time(command))
        row = self.rows[name]
        row.wall.append(wall)
        row.cpu.append(usage.ru_utime + usage.ru_stime)
        row.peak.append(usage.ru_maxrss / 1024)

    def _time(self, command: list[str]) -> tuple[float, Any]:
        # `wait4` tells of this one child. It counts what its parent had before the child's own
        # program began: this process must stay small, and never import torch.
        with (self.family / "log").open("wb") as log:
            began = time.perf_counter()
            child = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RunError(command, (self.family / "log").read_text(errors="replace"))
        return wall, usage

    def _child(self, what: str, inputs: list[Path], options: list[str]) -> dict[str, float]:
        command = [sys.executable, str(HERE / "benchmark_child.py"), what, *map(str, inputs)]
        done = subprocess.run([*command, *options], stdout=subprocess.PIPE, check=True)
        found: dict[str, float] = json.loads(done.stdout)
        return found

    def _fresh(self, measure: Callable[[], Any]) -> Any:
        """Measure with nothing at the output, and leave nothing but a Δ for apply."""
        if self._given.cold:
            _drop_caches(self.family)
        out, diff = self.family / "out", self.family / "diff"
        try:
            found = measure()
            if "apply" in self._given.what and (out / "base_samples.safetensors").exists():
                shutil.rmtree(diff, ignore_errors=True)
                out.rename(diff)
            return found
        finally:
            shutil.rmtree(out, ignore_errors=True)


def _drop_caches(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def machine(folder: Path) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    mounts = subprocess.run(
        ["df", "--output=fstype", str(folder)], stdout=subprocess.PIPE, text=True, check=False
    )
    return {
        "processor": names[0] if names else platform.processor(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "file_system": (mounts.stdout.split() or ["?"])[-1],
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "diffxfer": version("diffxfer"),
    }


def options() -> argparse.Namespace:
    """The options, as given on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="where the families are written: tmpfs or a disk")
    parser.add_argument("--shape", action="append", help="tiny, 0.5b, 1.2b (default), 3b, …")
    parser.add_argument("--what", action="append", choices=(*VERBS, "dry-run"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", help="cuda or cuda:N; the bus is timed then")
    parser.add_argument("--mergekit", help="mergekit-yaml, if not on PATH; none to leave it out")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each")
    parser.add_argument("--sparse", action="store_true", help="headers alone, data are holes")
    parser.add_argument("--keep", action="store_true", help="leave the families there")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    given = parser.parse_args()
    given.shape = given.shape or ["1.2b"]
    given.what = given.what or list(VERBS)
    given.mergekit = given.mergekit or shutil.which("mergekit-yaml")
    if given.mergekit == "none" or given.sparse:
        given.mergekit = None
    return given


def main() -> None:
    """Measure, and print what was found."""
    given = options()
    results: dict[str, dict[str, Any]] = {}
    about = machine(given.path)
    failure = None
    for shape in given.shape:
        bench = Bench(given.path, shape, given)
        try:
            tensors = bench.make()
            for number in range(given.runs):
                print(f"{shape}: run {number + 1} of {given.runs}", file=sys.stderr)
                bench.run()
        except RunError as failed:
            failure = str(failed)  # what was measured before it is printed all the same
            break
        finally:
            if not given.keep:
                shutil.rmtree(bench.family, ignore_errors=True)
        results[shape] = {name: row.summary(tensors) for name, row in bench.rows.items()}
    if given.json:
        print(
            json.dumps({"machine": about, "options": vars(given), "results": results}, default=str)
        )
    else:
        print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
        print("\n".join(table(results)), end="\n\n")
        print("\n".join(f"- {note}" for note in notes(results)))
    sys.exit(failure)


if __name__ == "__main__":
    main()
