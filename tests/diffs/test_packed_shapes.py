"""Packed diff vectors of odd shapes and of many tensors, and manifests that lie about them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from diffxfer import apply_diff, extract_diff, inspect_checkpoint, verify
from diffxfer.errors import DiffxferError
from tests import tiny
from tests.families import WORDS, fast_tokenizer, llama, save_model, save_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_SEEDED = torch.Generator().manual_seed(21)
EMBEDDING = "model.embed_tokens.weight"


def drawn(*shape: int, scale: float = 0.02) -> Tensor:
    return torch.randn(shape, generator=_SEEDED) * scale


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def pair_of(
    folder: Path, base: Mapping[str, Tensor], head: Mapping[str, Tensor] | None = None
) -> tuple[Path, Path]:
    """A fine-tune that moved every weight of a base a little and may add a head, and that base."""
    moved = {k: (v.float() + drawn(*v.shape, scale=5e-4)).to(v.dtype) for k, v in base.items()}
    finetuned = tiny.save_model(folder / "finetuned", moved | {**(head or {})})
    return finetuned, tiny.save_model(folder / "base", {**base})


def assert_restored(packed: Path, base: Path, finetuned: Path, out: Path) -> None:
    """Base and the packed difference give every bit of the fine-tune back."""
    apply_diff(packed, base, out, allow_unrelated=True)
    back, expected = load_file(out / tiny.SHARD), load_file(finetuned / tiny.SHARD)
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert back[name].shape == tensor.shape
        assert torch.equal(bits(back[name]), bits(tensor)), name
    assert verify(packed).tensors == len(expected)


def test_empty_tensors_and_scalars(tmp_path: Path) -> None:
    shapes = {"scalar": (), "rows": (0, 4), "columns": (3, 0), "one": (1, 1, 1)}
    base = {f"model.{name}.weight": drawn(*shape).bfloat16() for name, shape in shapes.items()}
    finetuned, base_folder = pair_of(tmp_path, base)
    extract_diff(finetuned, base_folder, tmp_path / "packed", pack=True)
    assert inspect_checkpoint(tmp_path / "packed").parameters == 2
    assert_restored(tmp_path / "packed", base_folder, finetuned, tmp_path / "back")


def test_nothing_but_empty_tensors(tmp_path: Path) -> None:
    finetuned, base = pair_of(tmp_path, {"model.empty.weight": drawn(0, 4).bfloat16()})
    extract_diff(finetuned, base, tmp_path / "packed", pack=True)
    assert_restored(tmp_path / "packed", base, finetuned, tmp_path / "back")


@pytest.mark.parametrize("count", [500, pytest.param(60_000, marks=pytest.mark.slow)])
def test_many_small_tensors(tmp_path: Path, count: int) -> None:
    """Of 64 elements each: hardly larger than rounded ones of 16 bits, which are not exact."""
    names = (f"model.layers.{n // 100}.mlp.experts.{n % 100}.w.weight" for n in range(count))
    finetuned, base = pair_of(tmp_path, {name: drawn(64).bfloat16() for name in names})
    extract_diff(finetuned, base, tmp_path / "plain")
    extract_diff(finetuned, base, tmp_path / "packed", pack=True)
    sizes = [(tmp_path / each / tiny.SHARD).stat().st_size for each in ("packed", "plain")]
    assert sizes[0] < 1.1 * sizes[1]
    assert_restored(tmp_path / "packed", base, finetuned, tmp_path / "back")


def roles(folder: Path, rows: Mapping[str, int], tokens: Mapping[str, tuple[str, ...]]) -> None:
    """Models of given numbers of rows, and their tokenizers' special tokens."""
    for seed, (role, count) in enumerate(rows.items()):
        model = save_model(folder / role, llama(vocab_size=count), seed)
        save_tokenizer(model, fast_tokenizer(tokens[role]), bos_token="<s>")


def test_a_token_that_finetuned_added_comes_back_with_its_row(tmp_path: Path) -> None:
    size = len(WORDS)
    tokens = {"finetuned": ("<s>", "<new>"), "base": ("<s>",)}
    roles(tmp_path, {"finetuned": size + 2, "base": size + 1}, tokens)
    pair = tmp_path / "finetuned", tmp_path / "base"
    report = extract_diff(*pair, tmp_path / "packed", pack=True)
    assert report.added_tokens == ("<new>",)
    apply_diff(tmp_path / "packed", pair[1], tmp_path / "back")
    back, finetuned = (load_file(each / tiny.SHARD) for each in (tmp_path / "back", pair[0]))
    assert back[EMBEDDING].shape == (size + 2, finetuned[EMBEDDING].shape[1])
    for name, tensor in finetuned.items():
        assert torch.equal(bits(back[name]), bits(tensor)), name


def test_padding_rows_that_finetuned_dropped_stay_as_they_are(tmp_path: Path) -> None:
    size = len(WORDS) + 1
    roles(
        tmp_path,
        {"finetuned": size, "base": size + 7},
        dict.fromkeys(("finetuned", "base"), ("<s>",)),
    )
    pair = tmp_path / "finetuned", tmp_path / "base"
    extract_diff(*pair, tmp_path / "packed", pack=True)
    apply_diff(tmp_path / "packed", pair[1], tmp_path / "back")
    folders = tmp_path / "back", *pair
    back, finetuned, base = (load_file(each / tiny.SHARD)[EMBEDDING] for each in folders)
    assert torch.equal(bits(back), bits(torch.cat([finetuned, base[size:]])))


def test_a_head_that_finetuned_added_comes_back(tmp_path: Path) -> None:
    up, norm = "model.layers.0.up_proj.weight", "model.norm.weight"
    head = {"score.weight": drawn(3, 9).bfloat16(), "score.bias": drawn(3)}
    weights = {up: drawn(300, 9).bfloat16(), norm: drawn(9).bfloat16()}
    finetuned, base = pair_of(tmp_path, weights, head)
    extract_diff(finetuned, base, tmp_path / "packed", pack=True, added="bring")
    apply_diff(tmp_path / "packed", base, tmp_path / "back", added="bring", allow_unrelated=True)
    back, expected = (load_file(each / tiny.SHARD) for each in (tmp_path / "back", finetuned))
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(bits(back[name]), bits(tensor)), name


LIES: dict[str, dict[str, Any]] = {
    "a huge shape": {"shape": [1 << 60]},
    "a huge product": {"shape": [1 << 40, 1 << 40]},
    "more elements": {"shape": [31, 40]},
    "fewer elements": {"shape": [29, 40]},
    "no such dtype": {"dtype": "I64"},
    "a narrower dtype": {"dtype": "BF16"},
    "no shape": {"shape": None},
    "neither": {"shape": None, "dtype": None},
}


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_lies(tmp_path: Path, name: str) -> None:
    tensor = "model.layers.0.up_proj.weight"
    finetuned, base = pair_of(tmp_path, {tensor: drawn(30, 40).bfloat16()})
    packed = tmp_path / "packed"
    extract_diff(finetuned, base, packed, pack=True)
    document = json.loads((packed / "diffxfer.json").read_text())
    document["tensors"][tensor] |= LIES[name]
    (packed / "diffxfer.json").write_text(json.dumps(document))
    with pytest.raises(DiffxferError) as caught:
        apply_diff(packed, base, tmp_path / "out", allow_unrelated=True)
    assert tensor in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()
