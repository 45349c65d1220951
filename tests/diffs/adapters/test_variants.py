"""Every kind of LoRA adapter against the merge of PEFT itself, in float64."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.diffs.adapters.variants import VARIANTS, merged
from tests.helpers import same_bits

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

EACH = pytest.mark.parametrize("name", VARIANTS)
ALONE = [name for name, variant in VARIANTS.items() if not variant.needs_base]
EXACT = ("--out-dtype", "float64", "--threads", "2")


def run(*argv: str | Path) -> None:
    done = tiny.run(*argv)
    assert (done.status, done.err) == (0, "")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / tiny.SHARD)


def grafted(folder: Path, out: Path, *options: str) -> dict[str, Tensor]:
    run("transfer", *(folder / role for role in ("adapter", "base", "target")), "-o", out, *options)
    return weights(out)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[n], right[n]) for n in left)


@EACH
def test_a_graft_is_what_peft_merges(made, tmp_path: Path, name: str) -> None:
    """target + (merged − base); the last digits of a matrix product differ between libraries."""
    folder = made(name)
    out, base, target = (
        grafted(folder, tmp_path / "out", *EXACT),
        *(weights(folder / role) for role in ("base", "target")),
    )
    expected = merged(folder)
    assert out.keys() == target.keys()
    changed = 0
    for tensor, found in out.items():
        delta = expected[tensor] - base[tensor].double()
        wanted = target[tensor].double() + delta
        assert torch.allclose(found, wanted, rtol=0, atol=1e-15), tensor
        changed += bool(delta.any())
        if not delta.any():
            assert same_bits(found, target[tensor].double()), tensor
    assert changed


@EACH
def test_extract_and_apply_give_the_same_bits(made, tmp_path: Path, name: str) -> None:
    folder, diff = made(name), tmp_path / "diff"
    adapter, base, target = (folder / role for role in ("adapter", "base", "target"))
    run("extract", adapter, base, "-o", diff, "--diff-dtype", "float64")
    run("verify", diff, "--finetuned", adapter, "--base", base)
    run("apply", diff, target, "-o", tmp_path / "out", *EXACT)
    assert equal(weights(tmp_path / "out"), grafted(folder, tmp_path / "direct", *EXACT))


@pytest.mark.parametrize("name", ALONE)
def test_apply_needs_no_base(made, tmp_path: Path, name: str) -> None:
    folder = made(name)
    options = (*EXACT, "--alpha", "0.7")
    run("apply", folder / "adapter", folder / "target", "-o", tmp_path / "out", *options)
    assert equal(weights(tmp_path / "out"), grafted(folder, tmp_path / "direct", *options))


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - set(ALONE)))
def test_apply_says_that_base_is_needed(made, tmp_path: Path, name: str) -> None:
    folder = made(name)
    done = tiny.run("apply", folder / "adapter", folder / "target", "-o", tmp_path / "out")
    assert done.status == 1
    assert len(done.err.splitlines()) == 1
    assert "diffxfer transfer ADAPTER BASE TARGET" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "autocast", "fewest", "most"),
    [
        ("bfloat16 factors", True, 0, 2),
        ("alpha over r", True, 0, 2),
        ("bfloat16 factors", False, 200, 450),  # about 25 %
        ("alpha over r", False, 350, 700),  # about 40 %: the factors lose digits too
    ],
)
def test_where_a_merge_of_peft_in_16_bits_differs(
    made,
    tmp_path: Path,
    dtype: torch.dtype,
    name: str,
    autocast: bool,
    fewest: int,
    most: int,
) -> None:
    """Ours is the float64 merge, rounded once; PEFT's is it too if it keeps factors in float32.

    With factors in 16 bits, PEFT rounds B·A to 16 bits before it adds it: an element may then be
    off by one unit in its last place, and more where base and Δ cancel.
    """
    folder, same = made(name), tmp_path / "same"
    shutil.copytree(folder / "base", same)
    done = tiny.run(
        *("transfer", folder / "adapter", folder / "base", same, "-o", tmp_path / "out"),
        *("--out-dtype", str(dtype).removeprefix("torch.")),
    )
    assert done.status == 0
    ours, truth = weights(tmp_path / "out"), merged(folder)
    theirs = merged(folder, dtype, autocast=autocast)
    worse, worst, changed = 0, 0.0, 0
    for tensor, exact in truth.items():
        assert same_bits(ours[tensor], exact.to(dtype)), tensor
        off = (theirs[tensor].double() - exact).abs()
        assert bool(((ours[tensor].double() - exact).abs() <= off).all()), tensor
        worse += int((ours[tensor] != theirs[tensor]).sum())
        step = torch.finfo(dtype).eps * exact.abs().clamp(min=2.0**-14)
        worst = max(worst, float((off / step).max()))
        changed += exact.numel() if "q_proj.w" in tensor or "down_proj" in tensor else 0
    assert changed == 1280
    assert fewest <= worse <= most
    assert (worst > 1) == (worse > 2)
