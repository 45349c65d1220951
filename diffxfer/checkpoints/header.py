"""Reading and validating safetensors headers from untrusted files.

A file is a little-endian u64 (the header's length), a JSON header and the data. `read_header`
refuses anything else.
"""

from __future__ import annotations

import gc
import json
import math
import os
import struct
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import xxhash

from diffxfer.checkpoints.stored import BITS, ShardFile, TensorSpec, stat_identity
from diffxfer.errors import HeaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from diffxfer.checkpoints.hub.repo_ids import HubFile

MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""

MAX_DIMENSIONS = 64
"""The limit of torch itself."""

PREFIX = struct.Struct("<Q")
"""The length of the JSON header, stored before it."""
HEADER_OFFSET = PREFIX.size
"""The offset of the JSON header: after its length."""

_DOWNLOAD_AGAIN = "download or save it again"
_SHORT = 200
_KEYS = frozenset({"dtype", "shape", "data_offsets"})


def read_header(fd: int, path: Path, *, whole: bool = True) -> dict[str, TensorSpec]:
    """Read and check the header of an open safetensors file.

    Args:
        fd: the file, open for reading.
        path: its path, for messages and for the specs.
        whole: refuse a file whose data is not exactly covered by its tensors.

    Returns:
        Every tensor by name, in the order of the header.

    Raises:
        HeaderError: if it violates the format.
    """
    status = os.fstat(fd)
    raw = _read_raw_header(lambda count, at: os.pread(fd, count, at), path, status.st_size)
    shard = ShardFile(path, status.st_size, stat_identity(status), xxhash.xxh3_128_hexdigest(raw))
    return _parse(raw, shard, whole=whole)


def parse_header(beginning: bytes, remote: HubFile, *, whole: bool = True) -> dict[str, TensorSpec]:
    """Check the header of a safetensors file on the Hub.

    Args:
        beginning: its first bytes, with the whole header unless the file is too short.
        remote: the file.
        whole: refuse a file whose data is not exactly covered by its tensors.

    Returns:
        Every tensor by name, in the order of the header.

    Raises:
        HeaderError: if it violates the format.
    """
    path, size = remote.path, remote.size
    try:
        raw = _read_raw_header(lambda count, at: beginning[at : at + count], path, size)
        digest = xxhash.xxh3_128_hexdigest(raw)
        return _parse(raw, ShardFile(path, size, remote.identity, digest, remote), whole=whole)
    except HeaderError as exc:  # the cache does not have it yet
        where = f"{remote.repo}@{remote.commit[:8]}/{remote.name}"
        remedy = "the file on the Hub is broken: report it to the owner of the repository"
        raise HeaderError(where, exc.problem, remedy) from exc


def _parse(raw: bytes, shard: ShardFile, *, whole: bool) -> dict[str, TensorSpec]:
    path = shard.path
    with _no_collection():
        entries = _parse_json(raw, path)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
            raise HeaderError(path, "its __metadata__ is not a map of strings", _DOWNLOAD_AGAIN)
        data_start = PREFIX.size + len(raw)
        specs: dict[str, TensorSpec] = {}
        shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        for name, entry in entries.items():
            spec = _parse_entry(name, entry, data_start, shard, shapes)
            specs[spec.name] = spec
            entries[name] = None  # frees it: an entry takes three times the memory of a spec
    if whole:
        _check_coverage(specs.values(), data_start, path, shard.size)
    return specs


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection, since all objects are kept: half the time for 60,000 tensors."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _read_raw_header(read: Callable[[int, int], bytes], path: Path, size: int) -> bytes:
    if size < PREFIX.size:
        what = "is empty" if size == 0 else f"has only {size} bytes"
        raise HeaderError(path, f"{what}, expected a safetensors file", _DOWNLOAD_AGAIN)
    (length,) = PREFIX.unpack(read(PREFIX.size, 0))
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            path,
            f"states a header of {length} bytes, but at most {MAX_HEADER_BYTES} are allowed",
            "the file is damaged or not a safetensors file: " + _DOWNLOAD_AGAIN,
        )
    if length > size - PREFIX.size:
        raise HeaderError(
            path,
            f"is truncated: it states a header of {length} bytes, but has {size} bytes in all",
            _DOWNLOAD_AGAIN,
        )
    raw = read(length, PREFIX.size)
    if len(raw) != length:
        raise HeaderError(path, "was truncated while its header was read", "run it again")
    return raw


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _DuplicateKeyError(f"names {short(twice)} twice")
    return found


def _names_nothing_twice(raw: bytes, entries: Any) -> bool:
    """Whether there are no duplicate keys; False if this fast check cannot decide.

    A hook that sees every pair would make parsing take three times as long. But a valid header has
    five strings per tensor: its name, its dtype and three keys. Without escapes, the number of
    quotes gives the number of strings, and a duplicate key would add one.
    """
    if not isinstance(entries, dict) or b"\\" in raw:
        return False
    metadata = entries.get("__metadata__")
    strings = 5 * len(entries)
    if metadata is not None:
        strings += 2 * len(metadata) - 4 if isinstance(metadata, dict) else 0
    return raw.count(b'"') == 2 * strings


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise HeaderError(path, "its header is not a JSON object", _DOWNLOAD_AGAIN)
    try:
        text = raw.decode("utf-8")
        entries = json.loads(text)
        if not _names_nothing_twice(raw, entries):
            entries = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKeyError as exc:
        raise HeaderError(path, f"its header {exc}", _DOWNLOAD_AGAIN) from exc
    except (ValueError, RecursionError) as exc:
        raise HeaderError(path, f"its header is not JSON ({exc})", _DOWNLOAD_AGAIN) from exc
    if not isinstance(entries, dict):
        raise HeaderError(path, "its header is not a JSON object", _DOWNLOAD_AGAIN)
    return entries


def short(value: object) -> str:
    """A value from a file for use in a message: escaped and of bounded length."""
    text = repr(value)
    return text if len(text) <= _SHORT else text[:_SHORT] + "…"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _parse_entry(
    name: str,
    entry: Any,
    data_start: int,
    shard: ShardFile,
    shapes: dict[tuple[int, ...], tuple[int, ...]],
) -> TensorSpec:
    def fail(problem: str) -> HeaderError:
        return HeaderError(shard.path, f"tensor {short(name)} {problem}", _DOWNLOAD_AGAIN)

    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise fail("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise fail(f"has the unknown dtype {short(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise fail(f"has shape {short(shape)}, expected a list of at most {MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise fail(f"has the data_offsets {short(offsets)}, expected a begin and an end")
    begin, end = offsets
    if begin > end:
        raise fail(f"ends at {end}, before it begins at {begin}")
    bits = math.prod(shape) * BITS[dtype]
    if bits != (end - begin) * 8:
        takes = f"{bits // 8} bytes" if bits < 1 << 80 else "more bytes than any file has"
        raise fail(f"has {end - begin} bytes, but {dtype} of shape {short(shape)} takes {takes}")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise fail("has a name that is not valid Unicode") from None
    # Share equal names and shapes between tensors and roles: this saves two thirds of the memory.
    sizes = tuple(shape)
    sizes = shapes.setdefault(sizes, sizes)
    return TensorSpec(sys.intern(name), sys.intern(dtype), sizes, shard, data_start + begin)


def _check_coverage(specs: Iterable[TensorSpec], data_start: int, path: Path, size: int) -> None:
    """Check that the tensors cover the data exactly: no holes, no overlaps, no rest."""
    # Empty tensors come before others with the same start, because Python's sort is stable.
    ordered = sorted(specs, key=lambda spec: 0 not in spec.shape)
    ordered.sort(key=attrgetter("start"))
    for before, spec in pairwise(ordered):
        end = before.start + before.nbytes
        if spec.start != end:
            what = "overlaps" if spec.start < end else "leaves a hole after"
            problem = f"tensor {short(spec.name)} {what} {short(before.name)}"
            raise HeaderError(path, problem, _DOWNLOAD_AGAIN)
    first = ordered[0].start if ordered else data_start
    if first != data_start:
        name, hole = short(ordered[0].name), first - data_start
        problem = f"tensor {name} leaves a hole of {hole} bytes before it"
        raise HeaderError(path, problem, _DOWNLOAD_AGAIN)
    end = ordered[-1].start + ordered[-1].nbytes if ordered else data_start
    if end > size:
        name = short(ordered[-1].name)
        problem = f"is truncated: tensor {name} ends at byte {end}, but the file has {size} bytes"
        raise HeaderError(path, problem, _DOWNLOAD_AGAIN)
    if end < size:
        problem = f"has {size - end} bytes that belong to no tensor"
        raise HeaderError(path, problem, _DOWNLOAD_AGAIN)
