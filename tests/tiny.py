"""Tiny models on disk, sound or broken by hand, and the command line run in this process."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import typer.main
from safetensors.torch import save_file

from diffxfer.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (6, 4),
    "model.layers.0.mlp.up_proj.weight": (3, 4),
    "model.layers.1.mlp.up_proj.weight": (3, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (6, 4),
}
UP = "model.layers.1.mlp.up_proj.weight"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 6,
    "hidden_size": 4,
    "tie_word_embeddings": False,
}
OPERANDS = {
    "transfer": ("finetuned", "base", "target"),
    "extract": ("finetuned", "base"),
    "apply": ("diff", "target"),
}
"""The folders that each command takes, in order."""


def tensors(role: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Small values that differ between roles, tensors and positions."""
    scale = {"base": 1.0, "finetuned": 1.25, "target": 1.5}[role]
    return {
        name: (torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape) * (scale + place)).to(
            dtype
        )
        for place, (name, shape) in enumerate(SHAPES.items())
    }


def save_model(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    sharded: bool = False,
) -> Path:
    """Write a checkpoint; if it is sharded, the last two tensors are in the second file."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG if config is None else config)
    if not sharded:
        save_file(dict(weights), folder / SHARD, metadata={"format": "pt"})
        return folder
    names = list(weights)
    parts = dict(zip(SHARDS, (names[:-2], names[-2:]), strict=True))
    for shard, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / shard, {"format": "pt"})
    placed = {name: shard for shard, part in parts.items() for name in part}
    write_json(folder / INDEX, {"metadata": {"total_size": 0}, "weight_map": placed})
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def edit_header(shard: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a shard and leave its data."""
    raw = shard.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    set_header(shard, json.dumps(header).encode())


def set_header(shard: Path, text: bytes, *, length: int | None = None) -> None:
    """Replace a shard's header, and optionally state a wrong length; keep its data."""
    raw = shard.read_bytes()
    (before,) = struct.unpack("<Q", raw[:8])
    stated = struct.pack("<Q", len(text) if length is None else length)
    shard.write_bytes(stated + text + raw[8 + before :])


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder: names, kinds, modes, contents and times of files."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            content: object = None
            if path.is_symlink():
                content = path.readlink()
            elif path.is_file():
                # A sparse file may be larger than memory.
                content = path.read_bytes() if status.st_size < 1 << 24 else status.st_size
                content = content, status.st_mtime_ns
            found[str(path.relative_to(root))] = status.st_mode, status.st_ino, content
    return found


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command."""

    status: int
    out: str
    err: str


# Making the parser of all commands takes longer than most of them: it is made once.
_COMMANDS = functools.cache(typer.main.get_command)


def run(*argv: str | Path, summary: bool = False) -> Outcome:
    """Run the command line in this process, without a terminal.

    `extract`, `apply` and `transfer` get `--quiet`, so that they print only warnings and errors,
    unless `summary` is set.
    """
    job = bool(argv) and argv[0] in ("extract", "apply", "transfer")
    if job and not summary and not {"--json", "--dry-run", "-q", "--quiet"} & set(map(str, argv)):
        argv = (*argv, "--quiet")
    # Written as UTF-8 like a real stream: what has no UTF-8 must not get this far.
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    status: object = 0
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", ["diffxfer", *map(str, argv)]),
        mock.patch.object(typer.main, "get_command", _COMMANDS),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        for setting in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "DIFFXFER_DEBUG"):
            os.environ.pop(setting, None)
        try:
            main()
        except SystemExit as exc:
            status = exc.code or 0
    texts = [stream.buffer.getvalue().decode() for stream in streams]  # type: ignore[attr-defined]
    assert isinstance(status, int)
    return Outcome(status, *texts)


@dataclass
class World:
    """A family in a separate folder, and the path of its output."""

    root: Path
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """An output whose parent does not exist either."""
        return self.root / "made" / "out"

    def argv(self, verb: str, *options: str) -> list[str]:
        """The command line of a verb on this family."""
        operands = [str(self.folders[role]) for role in OPERANDS[verb]]
        return [verb, *operands, "-o", str(self.out), "--threads", "1", *options]

    def copy(self, root: Path) -> World:
        """The same family elsewhere."""
        folders = {role: root / role for role in self.folders}
        for role, folder in folders.items():
            shutil.copytree(self.folders[role], folder, symlinks=True)
        return World(root, folders)


def make_world(root: Path, *, sharded: bool = False, dtype: torch.dtype = torch.bfloat16) -> World:
    """A sound family with its diff vector."""
    world = World(root)
    for role in ("base", "finetuned", "target"):
        folder = root / role
        world.folders[role] = save_model(folder, tensors(role, dtype), sharded=sharded)
    world.folders["diff"] = root / "diff"
    operands = (world.folders["finetuned"], world.folders["base"])
    done = run("extract", *operands, "-o", root / "diff", "--threads", "1")
    assert done == Outcome(0, "", ""), done
    return world
