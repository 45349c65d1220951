"""What `inspect` says of an adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from diffxfer import inspect_checkpoint
from tests import tiny
from tests.diffs.adapters.variants import VARIANTS

if TYPE_CHECKING:
    from pathlib import Path


def test_a_plain_adapter(made) -> None:
    adapter = made("alpha over r") / "adapter"
    told = json.loads(tiny.run("inspect", adapter, "--json").out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert told["kind"] == "adapter"
    assert told["tensors"] == 8
    assert told["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert told["dtypes"] == {"F32": told["parameters"]}
    assert told["adapter"] == {
        "base": "",
        "modules": 4,
        "ranks": [4],
        "scalings": [1.5],
        "alpha": 6.0,
        "dora": False,
        "targets": ["down_proj", "q_proj"],
        "whole": [],
        "token_rows": 0,
    }


def test_patterns(made) -> None:
    found = inspect_checkpoint(made("patterns") / "adapter").adapter
    assert found is not None
    assert found.ranks == (2, 4, 8)
    assert found.scalings == (3 / 4, 6 / 8, 3 / 2, 6 / 2)[1:]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_says_whether_it_needs_base(made, name: str) -> None:
    found = inspect_checkpoint(made(name) / "adapter").adapter
    assert found is not None
    assert found.needs_base == VARIANTS[name].needs_base


def test_the_table(made, tmp_path: Path) -> None:
    done = tiny.run("inspect", made("modules_to_save") / "adapter")
    assert done.status == 0, done.err
    for words in ("a LoRA adapter", "4 modules: down_proj, q_proj", "scaled by 1.5", "lm_head"):
        assert words in done.out
    assert "depends on its base" in done.out


def test_a_broken_one_is_refused(plain: Path) -> None:
    (plain / "adapter" / "adapter_config.json").write_text("{}")
    done = tiny.run("inspect", plain / "adapter")
    assert done.status == 1
    assert "is a PEFT adapter of type None" in done.err
