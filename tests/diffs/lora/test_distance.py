"""`verify ADAPTER --base --finetuned`: how far base + Δ is from the fine-tune."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer import extract_diff, verify
from diffxfer.errors import DamageError
from tests import tiny
from tests.diffs.lora.models import KINDS, merged_by_peft, save_adapter, save_pair, tensors

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("rest", ["modules_to_save", "lora", "drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_is_that_of_what_peft_merges(tmp_path, kind, rest):
    finetuned, base = save_pair(tmp_path, kind)
    extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=3, rest=rest)
    report = verify(tmp_path / "a", finetuned=finetuned, base=base)
    merged = merged_by_peft(tmp_path / "a", base, kind)
    ours, theirs = tensors(finetuned), tensors(base)
    assert {distance.name for distance in report.distances} == ours.keys()
    for distance in report.distances:
        name = distance.name
        error, size = (merged[name] - ours[name]).norm(), (ours[name] - theirs[name]).norm()
        assert distance.error_norm == pytest.approx(float(error), rel=1e-9, abs=1e-12)
        assert distance.delta_norm == pytest.approx(float(size), rel=1e-9)
    layers = report.as_json()["distances"]["layers"]
    inside = [d for d in report.distances if ".layers.0." in d.name or ".h.0." in d.name]
    expected = sum(d.error_norm**2 for d in inside) / sum(d.delta_norm**2 for d in inside)
    found = next(layer for layer in layers if layer["name"].endswith(".0"))
    assert found["ratio"] ** 2 == pytest.approx(expected)


def test_an_adapter_of_any_origin_will_do(tmp_path):
    finetuned, base = save_pair(tmp_path, "untied")
    extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=3)
    for name in ("diffxfer.json", "README.md"):
        (tmp_path / "a" / name).unlink()
    options = ("--base", base, "--finetuned", finetuned)
    done = tiny.run("verify", tmp_path / "a", *options)
    assert "has no manifest of ours" in done.out
    assert done.out.splitlines()[-1].startswith("all ")
    found = json.loads(tiny.run("verify", tmp_path / "a", *options, "--json").out)["distances"]
    assert 0 < found["ratio"] < 1


def test_delta_of_a_fine_tune_that_is_an_adapter_is_not_rounded(tmp_path):
    """Where Δ is below the last digit of base, base + Δ in base's dtype would be base."""
    adapter, _ = save_adapter(tmp_path)
    base = tmp_path / "base"
    state = load_file(base / tiny.SHARD)
    coarse = {name: (tensor + 64).bfloat16() for name, tensor in state.items()}
    save_file(coarse, base / tiny.SHARD, {"format": "pt"})
    extract_diff(adapter, base, tmp_path / "a", as_="lora", rank=4, diff_dtype="float32")
    factors = load_file(adapter / "adapter_model.safetensors")
    for found in verify(tmp_path / "a", finetuned=adapter, base=base).distances:
        a, b = (
            factors.get(f"base_model.model.{found.name.removesuffix('weight')}lora_{half}.weight")
            for half in "AB"
        )
        if a is not None:
            size = float((1.5 * b.double() @ a.double()).norm())
            assert found.delta_norm == pytest.approx(size, rel=1e-6)
            assert found.ratio < 1e-5


def test_a_damaged_adapter_is_not_measured(tmp_path):
    finetuned, base = save_pair(tmp_path, "untied")
    extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=3)
    file = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamageError, match="its checksum differs"):
        verify(tmp_path / "a", finetuned=finetuned, base=base)


def test_what_the_adapter_does_not_store_is_as_far_as_base(tmp_path):
    finetuned, base = save_pair(tmp_path, "untied")
    extract_diff(finetuned, base, tmp_path / "a", as_="lora", rank=3, include=[r"q_proj\.weight"])
    far = verify(tmp_path / "a", finetuned=finetuned, base=base).distances
    assert {d.ratio for d in far if "q_proj.weight" not in d.name} == {1.0}
    same = verify(tmp_path / "a", finetuned=shutil.copytree(base, tmp_path / "b"), base=base)
    assert {d.ratio for d in same.distances} == {0.0, None}, "Δ is zero, and the adapter is not"
    assert torch.isfinite(torch.tensor([d.error_norm for d in same.distances])).all()
