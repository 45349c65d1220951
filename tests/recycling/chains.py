"""What tests of chains share: a family of three bases, recipes, and models by hand."""

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
    """A recipe of three bases, without training and scores unless they are asked for."""
    known: dict[str, Any] = {"bases": ["base", "target", "newest"], "finetuned": "finetuned"}
    return {name: value for name, value in (known | changes).items() if value is not None}


def write_recipe(home: Path, **changes: Any) -> Path:
    """Write that recipe as JSON, which YAML is too."""
    path = home / "chain.yaml"
    path.write_text(json.dumps(recipe(**changes)))
    return path


def follow(home: Path, run: Path, **changes: Any) -> ChainReport:
    """Write the recipe and follow it."""
    return iterate(write_recipe(home, **changes), run)


def weights(folder: Path) -> bytes:
    """The one shard of a member of the family."""
    return (folder / "model.safetensors").read_bytes()


def models(run: Path) -> dict[str, bytes]:
    """Every model and diff vector of a run by its folder."""
    return {
        path.parent.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.glob("round-*/*/model.safetensors"))
    }


def left(run: Path) -> set[str]:
    """Every folder and file of the rounds that is not of scores, hidden ones too."""
    return {
        f"{path.parent.name}/{path.name}" for path in run.glob("round-*/*") if path.name != "scores"
    }
