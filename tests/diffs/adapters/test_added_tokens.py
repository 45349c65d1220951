"""Adapters whose tokenizer has more tokens than base's, with resized embeddings."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.diffs.adapters.variants import llama, load, near, randomised, save
from tests.helpers import same_bits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

ADDED = ("new1", "new2")
CASES: dict[str, dict[str, Any]] = {
    "stored whole": {},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "token rows": {"trainable_token_indices": [41, 40, 3]},
    "LoRA of both": {"target_modules": ["embed_tokens", "lm_head"]},
    "LoRA of the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
UNTIED = ("stored whole", "modules_to_save", "token rows", "LoRA of both")
TIED = ("stored whole", "token rows", "LoRA of the embedding")


def save_tokenizer(folder: Path, added: Sequence[str] = ()) -> None:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(40)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t1", eos_token="t2", pad_token="t3"
    )
    made.add_tokens(list(added))
    made.save_pretrained(folder)


def make(folder: Path, options: dict[str, Any], *, tied: bool) -> dict[str, Tensor]:
    """Base, target and an adapter with two more tokens; gives PEFT's merge."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base = llama(tie_word_embeddings=tied).bfloat16()
    save(base, folder / "base")
    save(near(base), folder / "target")
    for role in ("base", "target"):
        save_tokenizer(folder / role)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grown = load(folder / "base", torch.float32)
        grown.resize_token_embeddings(42)
        plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
        adapted = get_peft_model(grown, LoraConfig(**{**plain, **options}))
        randomised(adapted).save_pretrained(folder / "adapter")
        save_tokenizer(folder / "adapter", ADDED)
        truth = load(folder / "base", torch.float64)
        truth.resize_token_embeddings(42)
        merged = PeftModel.from_pretrained(
            truth, folder / "adapter", autocast_adapter_dtype=False
        ).double()
        return dict(merged.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, False) for name in UNTIED), *((name, True) for name in TIED)],
)
def test_the_new_tokens_come_with_their_rows(tmp_path: Path, name: str, tied: bool) -> None:
    merged = make(tmp_path, CASES[name], tied=tied)
    out = tmp_path / "out"
    roles = [tmp_path / role for role in ("adapter", "base", "target")]
    done = tiny.run("transfer", *roles, "-o", out, "--out-dtype", "float64")
    assert (done.status, done.err) == (0, "")
    made, base, target = (load_file(f / tiny.SHARD) for f in (out, *roles[1:]))
    assert made.keys() == target.keys()
    for tensor, found in made.items():
        rows = len(base[tensor])
        expected = merged[tensor].clone()
        expected[:rows] = target[tensor].double() + (merged[tensor][:rows] - base[tensor].double())
        # Rows of an embedding with factors are float32, since the adapter stores the embedding.
        assert torch.allclose(found, expected, rtol=0, atol=3e-8), tensor
        assert torch.equal(found[rows:].float(), merged[tensor][rows:].float()), tensor
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 42
    vocabulary = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    assert {(entry["content"], entry["id"]) for entry in vocabulary} >= {("new1", 40), ("new2", 41)}
    again = tmp_path / "again"
    done = tiny.run("extract", *roles[:2], "-o", tmp_path / "diff", "--diff-dtype", "float64")
    assert done.status == 0, done.err
    done = tiny.run("apply", tmp_path / "diff", roles[2], "-o", again, "--out-dtype", "float64")
    assert done.status == 0, done.err
    same = load_file(again / tiny.SHARD)
    assert all(same_bits(same[tensor], found) for tensor, found in made.items())


def test_separate_changes_of_a_tied_head_are_refused(tmp_path: Path) -> None:
    """PEFT's merge would add both to the one tensor, which is another model than was trained."""
    make(tmp_path, CASES["LoRA of both"], tied=True)
    roles = [tmp_path / role for role in ("adapter", "base", "target")]
    done = tiny.run("transfer", *roles, "-o", tmp_path / "out")
    assert done.status == 1
    assert "lm_head.weight differs from the embedding in finetuned" in done.err
    assert "--exclude 'lm_head'" in done.err
    done = tiny.run("transfer", *roles, "-o", tmp_path / "out", "--exclude", "lm_head")
    assert done.status == 0, done.err


def test_a_row_that_the_adapter_lacks_is_named(tmp_path: Path) -> None:
    """PEFT saves the embedding beside its factors, but not the head that was resized with it."""
    make(tmp_path, CASES["LoRA of the embedding"], tied=False)
    roles = [tmp_path / role for role in ("adapter", "base", "target")]
    done = tiny.run("transfer", *roles, "-o", tmp_path / "out")
    assert done.status == 1
    assert "lm_head.weight: has no row for 'new2'" in done.err


@pytest.mark.parametrize("targeted", [["q_proj"], ["embed_tokens", "lm_head", "q_proj"]])
@pytest.mark.parametrize("words", ["moved", "other"])
def test_apply_pairs_rows_by_the_adapter_s_own_tokens(
    tmp_path: Path, targeted: list[str], words: str
) -> None:
    """The target's tokens stand elsewhere, or differ; base is not needed to know."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = llama().bfloat16()
    save(base, tmp_path / "base")
    save(near(base), tmp_path / "target")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base.float(), LoraConfig(r=4, target_modules=targeted))
        randomised(adapted).save_pretrained(tmp_path / "adapter")
    for role in ("base", "adapter"):
        save_tokenizer(tmp_path / role)
    save_tokenizer(tmp_path / "target")
    path = tmp_path / "target" / "tokenizer.json"
    changed = json.loads(path.read_text())
    vocabulary = changed["model"]["vocab"]
    if words == "moved":
        vocabulary["t38"], vocabulary["t39"] = vocabulary["t39"], vocabulary["t38"]
    else:
        vocabulary["u39"] = vocabulary.pop("t39")
    path.write_text(json.dumps(changed))
    roles = [tmp_path / role for role in ("adapter", "base", "target")]
    done = tiny.run("transfer", *roles, "-o", tmp_path / "with_base")
    assert done.status == 0, done.err
    done = tiny.run("apply", roles[0], roles[2], "-o", tmp_path / "without")
    assert done.status == 0, done.err
    made, expected = (load_file(tmp_path / f / tiny.SHARD) for f in ("without", "with_base"))
    assert all(same_bits(made[name], tensor) for name, tensor in expected.items())
