"""A component of a diffusers pipeline as the roles of a graft: its files keep their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from diffxfer import apply_diff, extract_diff, transfer, verify
from tests.helpers import same_bits, save_shard

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

STEM = "diffusion_pytorch_model"


@pytest.fixture
def roles(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each role, which lies in the folder of its name."""
    found = {}
    for seed, role in enumerate(("base", "finetuned", "target")):
        torch.manual_seed(seed)
        found[role] = {f"conv.{i}.weight": 1 + torch.randn(4, 4, 3, 3) / 100 for i in range(3)}
        save_shard(tmp_path / role / f"{STEM}.safetensors", found[role])
        (tmp_path / role / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return found


def test_a_graft_has_the_names_of_its_target(
    tmp_path: Path, roles: dict[str, dict[str, Tensor]]
) -> None:
    finetuned, base, target = (tmp_path / role for role in ("finetuned", "base", "target"))
    transfer(finetuned, base, target, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{STEM}.safetensors", "config.json", "README.md", "diffxfer.json"}
    found = load_file(tmp_path / "out" / f"{STEM}.safetensors")
    for name, tensor in roles["target"].items():
        delta = roles["finetuned"][name].double() - roles["base"][name].double()
        assert same_bits(found[name], (tensor.double() + delta).float())
    assert verify(tmp_path / "out").tensors == 3


def test_shards_of_another_size_too(tmp_path: Path, roles: dict[str, dict[str, Tensor]]) -> None:
    del roles
    finetuned, base, target = (tmp_path / role for role in ("finetuned", "base", "target"))
    extract_diff(finetuned, base, tmp_path / "diff", diff_dtype="float64")
    apply_diff(tmp_path / "diff", target, tmp_path / "out", max_shard_size="600B")
    transfer(finetuned, base, target, tmp_path / "whole")
    names = [f"{STEM}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = f"{STEM}.safetensors.index.json"
    assert sorted(p.name for p in (tmp_path / "out").glob("*safetensors*")) == [*names, index]
    parts = [load_file(tmp_path / "out" / name) for name in names]
    found = {name: tensor for part in parts for name, tensor in part.items()}
    whole = load_file(tmp_path / "whole" / f"{STEM}.safetensors")
    assert found.keys() == whole.keys()
    assert all(same_bits(found[name], whole[name]) for name in whole)
    assert verify(tmp_path / "out").shards == 3
