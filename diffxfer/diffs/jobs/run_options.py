"""How a job is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.streaming.device import MEMORY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.streaming.distribute import Cluster


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a job is run; only `max_shard_bytes` and `allow_nonfinite` can affect the result.

    Attributes:
        threads: number of workers, None for one per processor.
        device: where the arithmetic runs, or ``"auto"``.
        device_memory: the most bytes to allocate on a GPU.
        allow_nonfinite: let NaN, infinity and overflow through.
        max_shard_bytes: the most bytes per shard, None to keep the input's division into shards.
        overwrite: replace a folder that diffxfer wrote at the output.
        restart: discard unfinished runs.
        dry_run: plan and check only; write nothing.
        progress: called with the bytes done and the total bytes.
        stream: read models from the Hub without downloading them.
        cluster: where the work is done in parts; None for this process.
    """

    threads: int | None = None
    device: str = "cpu"
    device_memory: int = MEMORY_BYTES
    allow_nonfinite: bool = False
    max_shard_bytes: int | None = None
    overwrite: bool = False
    restart: bool = False
    dry_run: bool = False
    progress: Callable[[int, int], None] | None = None
    stream: bool = False
    cluster: Cluster | None = None
