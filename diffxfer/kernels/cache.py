"""The cache of compiled kernels on disk.

There is one folder per version of the sources, the compiler and the processor: beside the sources,
or in the user's cache if that folder is read-only. `NUMBA_CACHE_DIR` replaces both. A file is
written completely or not at all, and has a checksum, so several processes may compile at once.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator

_HERE = Path(__file__).parent
_SOURCES = (
    *("dtypes.py", "lanes.py", "loops.py", "distance_loops.py", "decoding.py", "encoding.py"),
    *("packing.py", "rounding.py", "compiling.py", "processor.py", "signatures.py"),
)
_DIGEST_BYTES = 16


def find(name: str, processor: str) -> bytes | None:
    """Read cached code; None if there is none, or it is damaged.

    Args:
        name: the name of a kernel with its dtypes.
        processor: the processor that it is compiled for.
    """
    for folder in folders(processor):
        with suppress(OSError):
            data = (folder / name).read_bytes()
            digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
            if xxhash.xxh3_128_digest(code) == digest:
                return code
    return None


def keep(name: str, processor: str, code: bytes) -> OSError | None:
    """Store code for the next run.

    Args:
        name: the name of a kernel with its dtypes.
        processor: the processor that it is compiled for.
        code: its object file.

    Returns:
        The reason if it could not be stored, else None.
    """
    failure = OSError("there is no folder for it")
    for folder in folders(processor):
        try:
            _write(folder, name, xxhash.xxh3_128_digest(code) + code)
        except OSError as exc:
            failure = exc
        else:
            return None
    return failure


def _write(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f".{name}-{os.getpid()}"
    try:
        made.write_bytes(data)
        made.replace(folder / name)
    except OSError:
        with suppress(OSError):
            made.unlink()
        raise


def folders(processor: str) -> Iterator[Path]:
    """The folders of the cache, in the order of the search.

    Args:
        processor: the processor that the code is compiled for.
    """
    folder = f"diffxfer-{_version(processor)}"
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        yield Path(chosen) / folder
        return
    yield _HERE / "__pycache__" / folder
    with suppress(RuntimeError):  # a user without a home
        yield _user_cache() / "diffxfer" / folder


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen) if Path(chosen).is_absolute() else Path.home() / ".cache"


@cache
def _version(processor: str) -> str:
    """A hash of everything that compiled code depends on."""
    found = xxhash.xxh3_64()
    for name in _SOURCES:
        found.update((_HERE / name).read_bytes())
    for part in (version("numba"), version("llvmlite"), processor):
        found.update(b"\0" + part.encode())
    return found.hexdigest()
