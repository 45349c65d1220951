"""Families of models for the Hub: sharded, and large enough to count transferred bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from tests import tiny
from tests.hub.store import files_in

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hub.server import Hub

ROLES = ("finetuned", "base", "target")
IDS = {"finetuned": "me/llama-sft", "base": "org/llama-3.0", "target": "org/llama-3.1"}
WIDTH = 1024


def weights(role: str) -> dict[str, torch.Tensor]:
    """About 3 MB of bfloat16 that differ from role to role."""
    generator = torch.Generator().manual_seed(ROLES.index(role))

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    layers = {f"model.layers.{n}.mlp.up_proj.weight": some(320, WIDTH) for n in range(4)}
    return {
        "model.embed_tokens.weight": some(6, WIDTH),
        **layers,
        "model.norm.weight": some(WIDTH),
        "lm_head.weight": some(6, WIDTH),
    }


def make_family(root: Path) -> dict[str, Path]:
    """A folder for each role: two shards, and other files that repositories have."""
    folders = {}
    for role in ROLES:
        config = {**tiny.CONFIG, "hidden_size": WIDTH}
        folder = tiny.save_model(root / role, weights(role), config=config, sharded=True)
        tiny.write_json(folder / "generation_config.json", {"temperature": 0.5})
        (folder / "LICENSE").write_text("yours")
        (folder / "original").mkdir()
        others = "pytorch_model.bin", "model-Q4.gguf", "consolidated.safetensors"
        for name in ("original/consolidated.00.pth", *others):
            (folder / name).write_bytes(b"not this one" * 100_000)
        folders[role] = folder
    return folders


def publish(hub: Hub, folders: dict[str, Path]) -> dict[str, str]:
    """Put a family on the Hub; its commits by role."""
    return {role: hub.add(IDS[role], folder).refs["main"] for role, folder in folders.items()}


def transfer(out: str | Path, *options: str) -> list[str]:
    """The command line that grafts the family on the Hub."""
    return ["transfer", *(IDS[role] for role in ROLES), "-o", str(out), *options]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an output, without the names of its sources."""
    files = {name: path.read_bytes() for name, path in files_in(folder).items()}
    del files["README.md"]
    manifest = json.loads(files["diffxfer.json"])
    del manifest["sources"], manifest["files"]["README.md"], manifest["seal"]
    return {**files, "diffxfer.json": json.dumps(manifest).encode()}
