"""Companions, the files beside the weights: listing them, and reading them safely.

A checkpoint is not trusted: a companion may be a link to a private key, a FIFO that blocks, or
invalid JSON. Every file that is read or copied goes through `companion_path`.
"""

from __future__ import annotations

import os
import stat
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from diffxfer.checkpoints.json_read import parse_object
from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from pathlib import Path

MAX_COMPANION_BYTES = 256 * 1024 * 1024
TEMPLATE_FOLDER = "additional_chat_templates"
README = "README.md"

# Files that diffxfer writes anew in every output: neither copied nor reported as left out.
_MADE_ANEW = ("readme.md", "diffxfer.json", "*.safetensors.index.json")
_LEFT_OUT = (
    "consolidated*",
    "*.index.json",
    "adapter_config.json",
    "trainer_state.json",
    "*_results.json",
    "optimizer*",
    "scheduler*",
    "rng_state*",
)
_CARRIED = (
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.jinja", "*.py"),
    *("licen[cs]e*", "notice*", "copying*", "use_policy*"),
)
# Some of these would match a pattern above: `LICENSE.bin` is no licence text.
_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data"),
    *("*.h5", "*.msgpack", "*.npz", "*.pkl"),
)


class Companions(NamedTuple):
    """The files beside the weights in a checkpoint.

    Attributes:
        names: companions to copy, relative to the folder, with ``/``, sorted.
        left_out: all other files, sorted, except shards, index, README and manifest, which an
            output gets anew; folders end with ``/``, unprintable names are escaped.
    """

    names: tuple[str, ...]
    left_out: tuple[str, ...]


def is_code(name: str) -> bool:
    """Whether a companion is code that ``trust_remote_code`` would run."""
    return name.lower().endswith(".py")


def is_companion(name: str) -> bool:
    """Whether a file is a companion to copy, by its name alone.

    Args:
        name: relative to the checkpoint, with ``/``.
    """
    inside, _, last = name.rpartition("/")
    if inside:
        return name.isprintable() and inside == TEMPLATE_FOLDER and last.endswith(".jinja")
    return name.isprintable() and _is_companion(name.lower())


def companion_path(folder: Path, name: str) -> Path | None:
    """The path of a companion, if it exists and is safe to read.

    Args:
        folder: the checkpoint, which may lie in the Hub's cache.
        name: the companion's name relative to it.

    Returns:
        ``folder / name``, or None if it does not exist.

    Raises:
        CompanionError: it is not a regular file, or a link leads out of the folder (and out of
            the Hub cache's ``blobs`` of the same repository).
    """
    path = folder / name
    try:
        path.lstat()
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except PermissionError as exc:  # the file may exist nevertheless
        problem = f"cannot be read ({exc.strerror})"
        raise CompanionError(path, problem, "check its permissions") from exc
    except (OSError, RuntimeError, ValueError) as exc:
        if not os.path.lexists(path):
            return None
        # Before Python 3.13 a loop of links is a RuntimeError.
        raise CompanionError(path, "is a broken link", "replace the link with the file") from exc
    if not stat.S_ISREG(mode):
        raise _not_regular(path)
    _refuse_link_out(path, real, folder)
    return path


def _refuse_link_out(path: Path, real: Path, folder: Path) -> None:
    home = folder.resolve()
    if not any(real.is_relative_to(root) for root in (home, *_hub_blobs(home))):
        raise CompanionError(
            path,
            f"points outside the checkpoint, to {real}",
            "replace the link with the file if it belongs to the checkpoint, or delete it",
        )


def _hub_blobs(folder: Path) -> list[Path]:
    """The ``blobs`` folders of a snapshot's repository, and the cache's shared ones."""
    return [
        home / "blobs"
        for snapshots in folder.parents
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
        for home in (snapshots.parent, snapshots.parent.parent)
    ]


def _not_regular(path: Path) -> CompanionError:
    return CompanionError(path, "is not a regular file", "replace it with a regular file")


def read_bytes(path: Path) -> bytes:
    """A companion's bytes.

    Args:
        path: a path from `companion_path`.

    Returns:
        The whole content, at most 256 MiB.

    Raises:
        CompanionError: it is missing, not a regular file, too large or unreadable.
    """
    try:
        # Check the kind before opening, since opening a device may have an effect. O_NONBLOCK,
        # since a FIFO may have replaced the file meanwhile and opening it would block.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _not_regular(path)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise _not_regular(path)
            if info.st_size > MAX_COMPANION_BYTES:
                raise CompanionError(
                    path,
                    f"has {info.st_size} bytes, but a companion has at most {MAX_COMPANION_BYTES}",
                    "move it out of the checkpoint",
                )
            # Read its size and no more, since `read(n)` allocates n bytes before it reads.
            return file.read(info.st_size)
    except OSError as exc:
        problem = f"cannot be read ({exc.strerror})"
        raise CompanionError(path, problem, "check its permissions") from exc


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON companion.

    Python's ``NaN`` and ``Infinity`` are accepted: transformers writes them into configs
    (Mamba 2's ``time_step_limit``).

    Args:
        path: a path from `companion_path`.

    Returns:
        The object, with Python's ints and floats.

    Raises:
        CompanionError: it cannot be read, is not JSON, or is not an object.
    """
    return parse_object(read_bytes(path), path)


def optional_object(folder: Path, name: str) -> dict[str, Any]:
    """The object in a companion of ``folder``, empty if there is no such file."""
    path = companion_path(folder, name)
    return {} if path is None else read_object(path)


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        CompanionError: it is missing, unsafe or not a JSON object.
    """
    path = companion_path(folder, "config.json")
    if path is None:
        raise CompanionError(
            folder,
            "has no config.json, so it is not a checkpoint",
            "give the folder that contains config.json",
        )
    return read_object(path)


def list_companions(folder: Path) -> Companions:
    """List the files beside the weights, and which of them are copied.

    Args:
        folder: the checkpoint.

    Returns:
        The names of the companions, and of files that are left out.

    Raises:
        CompanionError: the folder cannot be listed, or a companion is not safe to read.
    """
    names: list[str] = []
    left_out: list[str] = []
    for name in _entries(folder):
        printable = name.isprintable()
        lower = name.lower()
        if name == TEMPLATE_FOLDER and _is_folder(folder / name):
            for inner in more_templates(folder):
                carried = inner.isprintable() and inner.endswith(".jinja")
                (names if carried else left_out).append(inner)
        elif _is_folder(folder / name):
            left_out.append(f"{name}/")
        elif printable and _is_companion(lower):
            names.append(name)
        elif not (_any(lower, _MADE_ANEW) or _is_shard(lower)):
            left_out.append(name)
    for name in names:
        companion_path(folder, name)
    return Companions(tuple(sorted(names)), tuple(sorted(map(_escaped, left_out))))


def more_templates(folder: Path) -> list[str]:
    """The files in a checkpoint's folder of additional chat templates.

    Args:
        folder: the checkpoint.

    Returns:
        Names relative to the checkpoint, sorted; empty if there is no such folder.

    Raises:
        CompanionError: it cannot be listed, or a link leads out of the checkpoint.
    """
    inside = folder / TEMPLATE_FOLDER
    if not _is_folder(inside):
        return []
    _refuse_link_out(inside, inside.resolve(), folder)
    return [f"{TEMPLATE_FOLDER}/{name}" for name in _entries(inside)]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link to an impossible name, or to a place without access
        return False


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as exc:
        problem = f"cannot be listed ({exc.strerror})"
        raise CompanionError(folder, problem, "check its permissions") from exc


def _is_companion(lower: str) -> bool:
    refused = lower.startswith(".") or _any(lower, (*_MADE_ANEW, *_LEFT_OUT, *_WEIGHTS))
    return not refused and _any(lower, _CARRIED)


def _is_shard(lower: str) -> bool:
    return lower.endswith(".safetensors") and not lower.startswith((".", "consolidated"))


def _any(lower: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(lower, pattern) for pattern in patterns)


def _escaped(name: str) -> str:
    return name if name.isprintable() else ascii(name)[1:-1]
