"""Bringing the weights that a plan needs from the Hub, once nothing is left to refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffxfer.checkpoints.hub.names import HubFile
    from diffxfer.streaming.plan import Plan


def missing_files(plan: Plan) -> list[HubFile]:
    """The files on the Hub that a plan reads and the Hub's cache does not have.

    Args:
        plan: what is to be done.
    """
    read = {spec.shard.path: spec.shard for task in plan.tasks for spec in task.inputs}
    remote = (read[path].remote for path in sorted(read))
    return [file for file in remote if file is not None and not file.here]


def fetch_inputs(
    plan: Plan, out: Path, needed: int, progress: Callable[[int, int], None] | None
) -> None:
    """Download what a plan needs, all roles at the same time, if the disk is large enough.

    Args:
        plan: what is to be done.
        out: the folder to be made.
        needed: how many more bytes that takes.
        progress: called with the bytes that are there and the bytes in all.

    Raises:
        DiskSpaceError: if it is not.
        HubError: if a file cannot be had.
    """
    files = missing_files(plan)
    if not files:
        return
    from diffxfer.checkpoints.hub.download import download, refuse_small_cache

    refuse_small_cache(files, out, needed, remedy=", or give --stream, which stores none of them")
    download(files, progress)
