"""Telling one job from another, so that no run goes on from what another one did."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import xxhash

from diffxfer.checkpoints.companions import read_bytes
from diffxfer.streaming.plan import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.streaming.plan import Plan


def fingerprint(
    plan: Plan, files: Mapping[str, bytes | Path], described: tuple[object, ...]
) -> str:
    """What stands for all that has a part in a byte of a result: 32 hexadecimal digits.

    Versions and inputs are in it too; the device and how many threads there are have no part.

    Args:
        plan: what is done.
        files: companions by name, new bytes or a file to copy.
        described: the verb, its options and its sources, as values with a `repr`.
    """
    digest = xxhash.xxh3_128()

    def take(*values: object) -> None:
        digest.update(repr(values).encode("utf-8", "backslashreplace"))

    take(version("diffxfer"), version("torch"), BLOCK_ELEMENTS)
    take(*described)
    # A file is known by inode, size and time: after a reboot its disk may have another number.
    inputs = {shard.path: number for number, shard in enumerate(plan.inputs)}
    take([shard.identity[1:] for shard in plan.inputs])
    for name, content in sorted(files.items()):
        take(name)
        digest.update(content if isinstance(content, bytes) else read_bytes(content))
    for task in plan.tasks:
        sources = [(inputs[spec.shard.path], spec.start, spec.dtype) for spec in task.inputs]
        take(task.name, task.operation.value, task.alpha, task.shard, task.start, sources)
        take(task.sample, *((run.kind.value, run.start, run.count, run.rows) for run in task.runs))
    for name, layout in plan.layouts.items():
        take(name, layout.header)
    return digest.hexdigest()
