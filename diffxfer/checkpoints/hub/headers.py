"""Fetching the headers of safetensors files on the Hub."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from diffxfer.checkpoints.header import MAX_HEADER_BYTES
from diffxfer.checkpoints.hub.ranges import RemoteFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.checkpoints.hub.repo_ids import HubFile

_AT_A_TIME = 8
_FIRST_OF_HEADER = 1 << 16


def fetch_headers(files: Sequence[HubFile]) -> dict[str, bytes]:
    """The beginning of safetensors files, including the header, fetched in parallel.

    Args:
        files: the files.

    Returns:
        The first bytes of each file by name: the length and the header, or less if the file is
        too short.

    Raises:
        HubError: if they cannot be fetched.
    """
    opened = [RemoteFile(file) for file in files]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            found = pool.map(_fetch_header, opened)
            return dict(zip((file.name for file in files), found, strict=True))
        finally:  # close before the pool waits for requests in progress
            for file in opened:
                file.close()


def _fetch_header(opened: RemoteFile) -> bytes:
    size = opened.file.size
    first = opened.fetch(0, min(size, _FIRST_OF_HEADER))
    if len(first) < 8:
        return first
    (length,) = struct.unpack("<Q", first[:8])
    if length > MAX_HEADER_BYTES:  # `parse_header` refuses it
        return first
    stop = min(size, 8 + length)
    return first[:stop] + (opened.fetch(len(first), stop) if stop > len(first) else b"")
