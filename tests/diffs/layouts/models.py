"""Models of transformers in common layouts, and the graft that is expected of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tests.families import randomize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

ROLES = ("finetuned", "base", "target")


def save(folder: Path, model_class: Any, config: Any, seed: int) -> Path:
    """A model with random float32 weights that are close to those of other seeds."""
    model = model_class(config)
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder


def save_roles(root: Path, *classes_and_configs: tuple[Any, Any]) -> list[Path]:
    """Finetuned, base and target, each of a class and a config."""
    return [
        save(root / role, *found, seed)
        for seed, (role, found) in enumerate(zip(ROLES, classes_and_configs, strict=True), 1)
    ]


def load(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    """Store other tensors in a checkpoint: what `change` makes of those that it has."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return folder


def rename(folder: Path, new_name: Callable[[str], str]) -> Path:
    return edit(folder, lambda tensors: {new_name(n): t for n, t in tensors.items()})


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def graft_of(finetuned: Tensor, base: Tensor, target: Tensor, alpha: float = 1.0) -> Tensor:
    """target + α·(finetuned − base), in float64, rounded once to the target's dtype."""
    delta = finetuned.double() - base.double()
    return (target.double() + delta * alpha).to(target.dtype)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not wrong, f"{len(wrong)} of {len(expected)} differ, such as {wrong[0]}"


def load_clean(model_class: Any, folder: Path) -> Any:
    """Load a model; nothing may be missing, unexpected, of another shape or newly made."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()
