"""One graft, however it is made: on the fly, from a packed diff vector, or in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer import apply_diff, extract_diff, transfer
from diffxfer.models.graft import graft_source
from tests import oracle
from tests.families import WORDS, fast_tokenizer, llama, save_model, save_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SPECIALS = {
    "base": ("<s>", "<gone>", "<kept>"),
    "finetuned": ("<s>", "<kept>", "<new>", "<newer>"),
    "target": ("<s>", "<kept>", "<its own>"),
}
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    # of finetuned, base and target
    "bfloat16": (BRAIN, BRAIN, BRAIN),
    "float16": (HALF, HALF, HALF),
    "float32": (SINGLE, SINGLE, SINGLE),
    "float64": (DOUBLE, DOUBLE, DOUBLE),
    "mixed": (HALF, BRAIN, SINGLE),
    "narrowed": (SINGLE, DOUBLE, BRAIN),
}


def odd_model(folder: Path, role: str, dtype: torch.dtype) -> Path:
    """A model of that dtype with zeros of both signs, subnormals and values far apart."""
    names = SPECIALS[role]
    seed = sorted(SPECIALS).index(role)
    save_model(folder, llama(vocab_size=len(WORDS) + len(names)), seed)
    save_tokenizer(folder, fast_tokenizer(names), bos_token="<s>")
    path = folder / "model.safetensors"
    found = load_file(path)
    random = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0.0, -0.0, -0.0, 1e-7, -1e-7, 1e-42, 3e4, 1e-20], dtype=DOUBLE)
    for name, tensor in found.items():
        flat = tensor.double().reshape(-1)
        flat += torch.randn(len(flat), generator=random, dtype=DOUBLE) * 1e-3
        places = torch.randperm(len(flat), generator=random)[: len(flat) // 3]
        flat[places] = odd[torch.randint(len(odd), (len(places),), generator=random)]
        found[name] = flat.reshape(tensor.shape).to(dtype)
    save_file(found, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_way_gives_the_same_bits(dtypes: str, tmp_path: Path) -> None:
    for role, dtype in zip(("finetuned", "base", "target"), DTYPES[dtypes], strict=True):
        odd_model(tmp_path / role, role, dtype)
    roles = tmp_path / "finetuned", tmp_path / "base", tmp_path / "target"
    options: dict[str, Any] = {"vocab": "tokens", "allow_unrelated": True}
    report = extract_diff(roles[0], roles[1], tmp_path / "packed", pack=True, **options)
    assert report.inexact == {}
    for alpha in (1.0, 0.7):
        transfer(*roles, tmp_path / f"direct{alpha}", alpha=alpha, **options)
        apply_diff(tmp_path / "packed", roles[2], tmp_path / f"made{alpha}", alpha=alpha, **options)
        direct = oracle.load(tmp_path / f"direct{alpha}")
        oracle.assert_same(oracle.load(tmp_path / f"made{alpha}"), direct)
        source = graft_source(tmp_path / "packed", roles[2], alpha, **options)
        oracle.assert_same({name: source.tensor(name) for name in source.names()}, direct)
        source.close()
    assert_is_formula(tmp_path, "model.norm.weight")


def assert_is_formula(folder: Path, name: str) -> None:
    """`transfer` gave the sum in float64, cast once; so did the other ways, if they agree."""
    f, b, t = (oracle.load(folder / role)[name] for role in ("finetuned", "base", "target"))
    expected = (t.double() + (f.double() - b.double()) * 0.7).to(t.dtype)
    assert oracle.same(oracle.load(folder / "direct0.7")[name], expected)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, DOUBLE])
def test_its_base_becomes_finetuned(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, with the rows that finetuned added; in memory, too."""
    for role in ("finetuned", "base"):
        odd_model(tmp_path / role, role, dtype)
    options: dict[str, Any] = {"vocab": "tokens", "allow_unrelated": True}
    pair = tmp_path / "finetuned", tmp_path / "base"
    extract_diff(*pair, tmp_path / "packed", pack=True, **options)
    report = apply_diff(tmp_path / "packed", pair[1], tmp_path / "back", **options)
    assert any("this target is the base itself" in line for line in report.warnings)
    back, finetuned = oracle.load(tmp_path / "back"), oracle.load(pair[0])
    tokens = {"model.embed_tokens.weight", "lm_head.weight"}
    assert oracle.same(back["model.norm.weight"], finetuned["model.norm.weight"])
    for name in finetuned.keys() - tokens:
        assert oracle.same(back[name], finetuned[name]), name
    ours = [*WORDS, *SPECIALS["finetuned"]]
    theirs = [*WORDS, *SPECIALS["base"], "<new>", "<newer>"]
    for name in tokens:
        for place, token in enumerate(ours):
            row = back[name][theirs.index(token)]
            assert oracle.same(row, finetuned[name][place]), (name, token)
    transfer(pair[0], pair[1], pair[1], tmp_path / "direct", **options)
    oracle.assert_same(oracle.load(tmp_path / "direct"), back)
    source = graft_source(tmp_path / "packed", pair[1], **options)
    oracle.assert_same({name: source.tensor(name) for name in source.names()}, back)
    source.close()


def test_almost_its_base_does_not(tmp_path: Path) -> None:
    """One element of the target is another one: the graft is that of `transfer`, everywhere."""
    for role in ("finetuned", "base"):
        odd_model(tmp_path / role, role, BRAIN)
    odd_model(tmp_path / "target", "base", BRAIN)
    path = tmp_path / "target" / "model.safetensors"
    found = load_file(path)
    found["model.norm.weight"][0] += 1
    save_file(found, path, {"format": "pt"})
    options: dict[str, Any] = {"vocab": "tokens", "allow_unrelated": True}
    roles = tmp_path / "finetuned", tmp_path / "base", tmp_path / "target"
    extract_diff(roles[0], roles[1], tmp_path / "packed", pack=True, **options)
    apply_diff(tmp_path / "packed", roles[2], tmp_path / "applied", **options)
    transfer(*roles, tmp_path / "direct", **options)
    oracle.assert_same(oracle.load(tmp_path / "applied"), oracle.load(tmp_path / "direct"))
