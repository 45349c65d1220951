"""What the benchmark runs in processes of their own: making a family, the floor, the loops.

Each prints one JSON object. `floor` reads and writes as many bytes as a verb does, with as many
threads, from and to files that are allocated alike, and computes nothing. A verb's loop is the verb
itself, with the seconds that its threads took, once the files are allocated. `bus` moves the same
bytes to a GPU and back from pinned memory, both ways at once, and reads no file.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_family import SHAPES, make_family
from benchmark_table import VERBS

from diffxfer.checkpoints.filesystem import allocate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffxfer.diffs.jobs.report import Report
    from diffxfer.streaming.statistics import TensorResult
    from diffxfer.streaming.sync import Syncer

_CHUNK_BYTES = 1 << 19
"""As the engine reads bfloat16; larger ones were no faster, as they leave the caches."""
_BUS_BYTES = 1 << 24


def floor(inputs: list[Path], out: Path | None, threads: int) -> dict[str, float]:
    """Read every byte of some folders' shards, and write those of the last.

    Args:
        inputs: folders with shards of the same names and sizes.
        out: the folder to write; None to write nothing.
        threads: how many share the work.
    """
    names = sorted(path.name for path in inputs[-1].glob("*.safetensors"))
    sizes = {name: (inputs[-1] / name).stat().st_size for name in names}
    reads = {name: [os.open(folder / name, os.O_RDONLY) for folder in inputs] for name in names}
    writes: dict[str, int] = {}
    if out is not None:
        out.mkdir()
        writes = {name: os.open(out / name, os.O_CREAT | os.O_WRONLY) for name in names}
    for name, fd in writes.items():
        allocate(fd, sizes[name])
    spans = ((name, at) for name in names for at in range(0, sizes[name], _CHUNK_BYTES))
    lock = threading.Lock()
    began, cpu = time.perf_counter(), time.process_time()
    workers = [
        threading.Thread(target=_copy, args=(spans, lock, sizes, reads, writes))
        for _ in range(threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in writes.values():
        os.fsync(fd)
    moved = sum(sizes.values()) * (len(inputs) + bool(writes))
    return {
        "loop_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu,
        "moved": moved,
    }


def _copy(
    spans: Iterator[tuple[str, int]],
    lock: threading.Lock,
    sizes: dict[str, int],
    reads: dict[str, list[int]],
    writes: dict[str, int],
) -> None:
    buffers = [memoryview(bytearray(_CHUNK_BYTES)) for _ in next(iter(reads.values()))]
    while True:
        with lock:
            name, at = next(spans, ("", 0))
        if not name:
            return
        count = min(_CHUNK_BYTES, sizes[name] - at)
        for fd, buffer in zip(reads[name], buffers, strict=True):
            os.preadv(fd, [buffer[:count]], at)
        if writes:
            os.pwrite(writes[name], buffers[-1][:count], at)


def bus(inputs: list[Path], device: str) -> dict[str, float]:
    """Copy as many bytes to a GPU as some folders' shards have, and back as the last one's have.

    Args:
        inputs: folders with shards of the same names and sizes.
        device: the GPU, such as ``"cuda:0"``.
    """
    from diffxfer.streaming.cuda import Cuda

    gpu = Cuda(device)
    size = sum(path.stat().st_size for path in inputs[-1].glob("*.safetensors"))
    counts = _BUS_BYTES * len(inputs), _BUS_BYTES
    slots = deque(
        ([gpu.pinned(n) for n in counts], [gpu.memory(n) for n in counts]) for _ in range(4)
    )
    flights = deque[Any]()
    began = time.perf_counter()
    for _ in range(-(-size // _BUS_BYTES)):
        if len(flights) == len(slots):
            gpu.wait(flights.popleft())
        here, there = slots[0]
        slots.rotate()
        flights.append(gpu.submit((there[0], here[0]), lambda: None, (here[1], there[1])))
    gpu.close()
    return {"loop_s": time.perf_counter() - began}


def loop(
    verb: str, inputs: list[Path], out: Path | None, threads: int, device: str
) -> dict[str, float]:
    """Run a verb and time its threads.

    Args:
        verb: ``"extract"``, ``"apply"``, ``"transfer"`` or ``"inspect"``.
        inputs: the folders that it takes, in its order.
        out: the folder to write; None where nothing is written.
        threads: how many share the work.
        device: where the arithmetic runs.
    """
    import diffxfer
    from diffxfer.streaming import engine

    found: dict[str, float] = {}

    class Timed(engine.Engine):
        def run(
            self, threads: int, syncer: Syncer | None, progress: Callable[[int, int], None] | None
        ) -> Sequence[TensorResult]:
            for future in self._created.values():
                future.result()
            began, cpu = time.perf_counter(), time.process_time()
            results = super().run(threads, syncer, progress)
            found["loop_s"] = time.perf_counter() - began
            found["cpu_s"] = time.process_time() - cpu
            return results

    engine.Engine = Timed  # type: ignore[misc]  # to time a part that no caller sees
    if out is None:
        compared = diffxfer.compare_checkpoints(*inputs, threads=threads)
        return {**found, "moved": compared.bytes_read}
    run: dict[str, Callable[..., Report]] = {
        "extract": diffxfer.extract_diff,
        "apply": diffxfer.apply_diff,
        "transfer": diffxfer.transfer,
    }
    report = run[verb](*inputs, out, threads=threads, device=device)
    return {**found, "moved": report.bytes_to_read + report.bytes_to_write}


def main() -> None:
    """Do what the arguments say and print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("make", "floor", "bus", *VERBS))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape")
    parser.add_argument("--sparse", action="store_true")
    given = parser.parse_args()
    found: dict[str, float] = {}
    if given.what == "make":
        make_family(given.folders[0], SHAPES[given.shape], sparse=given.sparse)
        found["tensors"] = sum(1 for _ in SHAPES[given.shape].tensors())
    elif given.what == "floor":
        found = floor(given.folders, given.out, given.threads)
    elif given.what == "bus":
        found = bus(given.folders, given.device)
    else:
        found = loop(given.what, given.folders, given.out, given.threads, given.device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
