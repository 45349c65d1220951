"""Adapters of a base that ties its head, which train the embedding or the head whole."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.diffs.adapters.variants import llama, merged, near, randomised, save

if TYPE_CHECKING:
    from pathlib import Path

CASES: dict[str, dict[str, Any]] = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding by its full name": {"modules_to_save": ["model.embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head": {"modules_to_save": ["lm_head"]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make(folder: Path, options: dict[str, Any]) -> None:
    """A tied base, a tied and an untied target, and an adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True).bfloat16()
    save(base, folder / "base")
    save(near(base), folder / "tied")
    torch.manual_seed(0)
    save(near(llama().bfloat16()), folder / "untied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
        model = get_peft_model(base.float(), LoraConfig(**{**plain, **options}))
        randomised(model).save_pretrained(folder / "adapter")


@pytest.mark.parametrize("name", CASES)
def test_a_target_with_its_own_head_gets_what_peft_merges(tmp_path: Path, name: str) -> None:
    make(tmp_path, CASES[name])
    out = tmp_path / "out"
    roles = [tmp_path / role for role in ("adapter", "base", "untied")]
    done = tiny.run("transfer", *roles, "-o", out, "--out-dtype", "float64")
    assert done.status == 0, done.err
    made, base, target = (load_file(f / tiny.SHARD) for f in (out, *roles[1:]))
    expected = merged(tmp_path)
    base[HEAD] = base[EMBEDDING]
    for tensor, found in made.items():
        delta = expected[tensor] - base[tensor].double()
        assert torch.allclose(found, target[tensor].double() + delta, rtol=0, atol=3e-8), tensor
    kept = torch.equal(made[HEAD], target[HEAD].double())
    assert kept == name.startswith("embedding"), "the head keeps base's values"


@pytest.mark.parametrize("name", CASES)
def test_a_tied_target_has_no_place_for_two(tmp_path: Path, name: str) -> None:
    make(tmp_path, CASES[name])
    roles = [tmp_path / role for role in ("adapter", "base", "tied")]
    done = tiny.run("transfer", *roles, "-o", tmp_path / "out", "--out-dtype", "float64")
    expected = merged(tmp_path)
    tied = torch.equal(expected[HEAD], expected[EMBEDDING])
    assert tied == (name == "tied")
    assert (done.status == 0) == tied
    if not tied:
        assert "lm_head.weight differs from the embedding in finetuned" in done.err
        assert "one tensor for both" in done.err
        return
    made, base, target = (load_file(f / tiny.SHARD) for f in (tmp_path / "out", *roles[1:]))
    delta = expected[EMBEDDING] - base[EMBEDDING].double()
    wanted = target[EMBEDDING].double() + delta
    assert HEAD not in made
    assert torch.allclose(made[EMBEDDING], wanted, rtol=0, atol=3e-8)
