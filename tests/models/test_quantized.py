"""Quantised models in memory: the decoded values in bfloat16."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from diffxfer.models import checkpoint as module
from diffxfer.models.checkpoint import checkpoint_source
from diffxfer.models.load import load_path
from diffxfer.models.loading import load, refill
from tests import families, tiny
from tests.checkpoints.encodings.codings import FP8, INT4, NF4_DOUBLE
from tests.helpers import same_bits

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.checkpoints.encodings.codings import Coding

CODINGS = pytest.mark.parametrize("coding", [FP8, INT4, NF4_DOUBLE], ids=lambda c: c.name)


def save(folder: Path, coding: Coding, seed: int) -> dict[str, Tensor]:
    """Write a quantised model; returns its values in bfloat16."""
    families.save_model(folder, families.llama(), seed)
    weights = load_file(folder / tiny.SHARD)
    encoded = coding.encode({name: weights.pop(name) for name in list(weights) if "proj" in name})
    save_file({**weights, **encoded}, folder / tiny.SHARD, metadata={"format": "pt"})
    tiny.edit_json(folder / "config.json", lambda config: config.update(coding.config))
    (folder / "quantize_config.json").write_text("{}")
    values = {**weights, **coding.decode(encoded)}
    return {name: tensor.bfloat16() for name, tensor in values.items()}


@CODINGS
def test_it_is_loaded_decoded(tmp_path: Path, coding: Coding, monkeypatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 100)
    values = save(tmp_path / "a", coding, 1)
    others = save(tmp_path / "b", coding, 2)
    with checkpoint_source(tmp_path / "a") as source:
        config = json.loads((source.folder / "config.json").read_text())
        assert "quantization_config" not in config
        assert not (source.folder / "quantize_config.json").exists()
        assert set(source.names()) == set(values)
        assert {source.dtype(name) for name in values} == {"BF16"}
        loaded = load(source)
        found = loaded.model.state_dict()
        assert all(same_bits(found[name], tensor) for name, tensor in values.items())
        scratch = source.folder
    assert not scratch.exists()
    assert "quantization_config" in json.loads((tmp_path / "a" / "config.json").read_text())
    with checkpoint_source(tmp_path / "b") as source:
        refill(loaded, source)
    found = loaded.model.state_dict()
    assert all(same_bits(found[name], tensor) for name, tensor in others.items())


def test_a_path_begins_in_fp8_and_ends_in_bfloat16(tmp_path: Path) -> None:
    values = save(tmp_path / "a", FP8, 1)
    families.save_model(tmp_path / "b", families.llama(), 2)
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "b").state_dict()
    found = load_path(tmp_path / "a", tmp_path / "b", 0.25).model.state_dict()
    for name, tensor in values.items():
        expected = (0.75 * tensor.double() + 0.25 * ends[name].double()).bfloat16()
        assert same_bits(found[name], expected), name


def test_a_tensor_without_elements(tmp_path: Path) -> None:
    folder = tiny.save_model(
        tmp_path / "m",
        {**FP8.encode({"a.weight": torch.ones(4, 4)}), "b": torch.zeros(0, 4)},
        config={**tiny.CONFIG, **FP8.config},
    )
    with checkpoint_source(folder) as source:
        assert source.tensor("b").shape == (0, 4)
        assert source.tensor("a.weight").tolist() == torch.ones(4, 4).tolist()
