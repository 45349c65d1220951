"""An adapter in the place of a diff vector."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer import apply_diff, evaluate
from tests import tiny
from tests.evaluation.conftest import FAMILY, QUICK

if TYPE_CHECKING:
    from pathlib import Path

TARGET = FAMILY / "target"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Factors for every matrix of the layers."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for path in sorted(TARGET.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if ".layers." in name and tensor.dim() == 2:
                module = f"base_model.model.{name.removesuffix('.weight')}"
                for half, shape in (("A", (2, tensor.shape[1])), ("B", (tensor.shape[0], 2))):
                    drawn = torch.randn(shape, generator=generator) * 0.1
                    factors[f"{module}.lora_{half}.weight"] = drawn
    save_file(factors, folder / "adapter_model.safetensors")
    tiny.write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    return folder


def test_a_graft_is_scored_like_the_one_that_apply_makes(adapter: Path, tmp_path: Path) -> None:
    apply_diff(adapter, TARGET, tmp_path / "graft")
    options = {**QUICK, "tasks": "pig_latin", "limit": 8}
    found = evaluate([TARGET], diff=adapter, output=tmp_path / "scores", **options)
    expected = evaluate([TARGET, tmp_path / "graft"], **options)
    assert [(row.metric, row.value) for row in found.rows] == [
        (row.metric, row.value) for row in expected.rows
    ]
    again = evaluate([TARGET], diff=adapter, output=tmp_path / "scores", **options)
    assert len(again.reused) == 2
    # A factor of another size is another model, though no weight differs.
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    changed = evaluate([TARGET], diff=adapter, output=tmp_path / "scores", **options)
    assert len(changed.reused) == 1
