"""Fingerprints of jobs, so that a run resumes only its own job."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.companions import read_bytes
from diffxfer.streaming.plan import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.streaming.plan import Plan


def fingerprint(
    plan: Plan, files: Mapping[str, bytes | Path], described: tuple[object, ...]
) -> str:
    """A hash of everything that the bytes of the result depend on: 32 hexadecimal digits.

    It covers versions and inputs, but not the device or the number of threads.

    Args:
        plan: the work.
        files: companions by name, each as new bytes or as a file to copy.
        described: the verb, its options and its sources, as values with a `repr`.
    """
    digest = xxhash.xxh3_128()

    def take(*values: object) -> None:
        digest.update(repr(values).encode("utf-8", "backslashreplace"))

    take(version("diffxfer"), version("torch"), BLOCK_ELEMENTS)
    take(*described)
    # Inode, size and mtime identify a file; its device number may change after a reboot.
    inputs = {shard.path: number for number, shard in enumerate(plan.inputs)}
    take([shard.identity[1:] for shard in plan.inputs])
    for name, content in sorted(files.items()):
        take(name)
        digest.update(content if isinstance(content, bytes) else read_bytes(content))
    for task in plan.tasks:
        sources = [_source(stored, inputs) for stored in task.inputs]
        take(task.name, task.operation.value, task.alpha, task.shard, task.start, sources)
        take(task.sample, *((run.kind.value, run.start, run.count, run.rows) for run in task.runs))
    for name, layout in plan.layouts.items():
        take(name, layout.header)
    return digest.hexdigest()


def _source(stored: StoredTensor, inputs: Mapping[Path, int]) -> tuple[object, ...]:
    parts = ((inputs[part.shard.path], part.start, part.dtype) for part in stored.parts)
    return stored.dtype, *parts, *stored.parameters
