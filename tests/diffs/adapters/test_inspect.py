"""What `inspect` says of an adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from diffxfer import inspect_checkpoint
from tests import tiny
from tests.diffs.adapters.test_added_tokens import CASES, make
from tests.diffs.adapters.variants import VARIANTS, make_adapter

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
        "embedding_rows": 0,
        "resized": False,
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


@pytest.mark.parametrize("resized", [False, True])
def test_an_embedding_that_may_be_resized(tmp_path: Path, monkeypatch, resized: bool) -> None:
    """PEFT stores the embedding beside its factors; only base says whether it was resized."""
    if resized:
        make(tmp_path, CASES["LoRA of the embedding"], tied=True)
    else:
        make_adapter(VARIANTS["embedding and head"], tmp_path)
    rows = 42 if resized else 40
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    config = adapter / "adapter_config.json"
    tiny.edit_json(config, lambda c: c.update(base_model_name_or_path="org/elsewhere"))
    done = tiny.run("inspect", adapter)
    assert f"is complete if its base has {rows} rows of tokens, else it depends" in done.out
    monkeypatch.chdir(tmp_path)
    tiny.edit_json(config, lambda c: c.update(base_model_name_or_path="base"))
    done = tiny.run("inspect", adapter)
    assert ("depends on its base" in done.out) == resized
    assert ("apply needs no base" in done.out) == (not resized)
    applied = tiny.run("apply", adapter, tmp_path / "base", "-o", out)
    assert (applied.status == 1) == resized, "apply does what inspect says"


def test_a_broken_one_is_refused(plain: Path) -> None:
    (plain / "adapter" / "adapter_config.json").write_text("{}")
    done = tiny.run("inspect", plain / "adapter")
    assert done.status == 1
    assert "is a PEFT adapter of type None" in done.err
