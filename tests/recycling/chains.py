"""Helpers for tests of chains: a family of three bases, and recipes."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from diffxfer import iterate
from tests.recycling.training import FAMILY, RATE, write_rows

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.recycling.chain_report import ChainReport

TRAIN: dict[str, Any] = {
    "data": "train.jsonl",
    "steps": 2,
    "batch_size": 8,
    "learning_rate": RATE,
    "max_length": 64,
    "device": "cpu",
}
EVAL: dict[str, Any] = {
    "tasks": ["pig_latin"],
    "include_path": str(FAMILY / "tasks"),
    "limit": 8,
    "batch_size": 8,
    "device": "cpu",
    "dtype": "float32",
}


def make_home(folder: Path) -> Path:
    """A folder for recipes: three bases of one family, a fine-tuned first one, and rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for member in ("base", "target", "finetuned"):
        shutil.copytree(FAMILY / member, folder / member)
    shutil.copytree(FAMILY / "target", folder / "newest")
    weights = load_file(FAMILY / "target" / "model.safetensors")
    moved = {name: (tensor.double() * 1.01).to(tensor.dtype) for name, tensor in weights.items()}
    save_file(moved, folder / "newest" / "model.safetensors", {"format": "pt"})
    write_rows(folder / "train.jsonl")
    return folder


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe of three bases; without training and scores by default."""
    known: dict[str, Any] = {"bases": ["base", "target", "newest"], "finetuned": "finetuned"}
    return {name: value for name, value in (known | changes).items() if value is not None}


def write_recipe(home: Path, **changes: Any) -> Path:
    """Write the recipe as JSON, which is valid YAML."""
    path = home / "chain.yaml"
    path.write_text(json.dumps(recipe(**changes)))
    return path


def follow(home: Path, run: Path, **changes: Any) -> ChainReport:
    """Write the recipe and run it."""
    return iterate(write_recipe(home, **changes), run)


def weights(folder: Path) -> bytes:
    """The bytes of the only shard of a member of the family."""
    return (folder / "model.safetensors").read_bytes()


def models(run: Path) -> dict[str, bytes]:
    """The weights of every model and diff vector of a run, by folder."""
    return {
        path.parent.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.glob("round-*/*/model.safetensors"))
    }


def left(run: Path) -> set[str]:
    """Every folder and file of the rounds, including hidden ones, without scores."""
    return {
        f"{path.parent.name}/{path.name}" for path in run.glob("round-*/*") if path.name != "scores"
    }
