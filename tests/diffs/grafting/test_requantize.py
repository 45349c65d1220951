"""Grafts in the format of their target, against a computation in float64."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from diffxfer.checkpoints.files import OpenShard
from tests import tiny
from tests.checkpoints.encodings import scaled_halves
from tests.checkpoints.encodings.codings import FP8, INT4, INT8, NF4_BLOCKS
from tests.helpers import same_bits

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.checkpoints.encodings.codings import Coding

CONFIG = {**tiny.CONFIG, "vocab_size": 12, "hidden_size": 8}
ROLES = ("finetuned", "base", "target")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    base = scaled_halves.example(1)
    near = {"finetuned": scaled_halves.example(2, base), "target": scaled_halves.example(3, base)}
    return {"base": base, **near}


def save(root: Path, weights: dict[str, dict[str, Tensor]], coding: Coding) -> list[Path]:
    """Write the three models, all of one format."""
    config = {**CONFIG, **coding.config}
    return [
        tiny.save_model(root / role, coding.encode(weights[role]), config=config) for role in ROLES
    ]


def run(*argv: str | Path) -> str:
    done = tiny.run(*argv)
    assert done.status == 0, done.err
    return done.out


def exact(folders: list[Path], coding: Coding, alpha: float) -> dict[str, Tensor]:
    """The graft in float64, of the decoded values."""
    finetuned, base, target = (
        coding.decode(load_file(folder / "model.safetensors")) for folder in folders
    )
    return {
        name: tensor.double() + (finetuned[name].double() - base[name].double()) * alpha
        for name, tensor in target.items()
    }


@pytest.mark.parametrize("coding", [FP8, INT4, INT8], ids=lambda coding: coding.name)
def test_the_stored_graft_is_near_the_exact_one(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]], coding: Coding
) -> None:
    folders = save(tmp_path, weights, coding)
    out = tmp_path / "out"
    told = json.loads(
        run("transfer", *folders, "-o", out, "--requantize", "--alpha", "0.7", "--json")
    )
    stored = load_file(out / "model.safetensors")
    target = load_file(folders[2] / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in stored.items()} == {
        name: (t.dtype, t.shape) for name, t in target.items()
    }
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == coding.config["quantization_config"]
    due, found = exact(folders, coding, 0.7), coding.decode(stored)
    decoded = coding.decode(target)
    errors = {each["name"]: each for each in told["requantized"]}
    encoded = {name for name, tensor in weights["target"].items() if tensor.dim() > 1}
    assert errors.keys() == encoded
    for name, tensor in due.items():
        if name not in encoded:
            assert torch.equal(found[name], tensor.to(found[name].dtype))
            continue
        # The exact graft is rounded to float32 before it is quantised.
        single = tensor.float().double()
        error = float((found[name].double() - single).norm())
        change = float((single - decoded[name].double()).norm())
        assert errors[name]["error"] == pytest.approx(error, rel=1e-6)
        assert errors[name]["change"] == pytest.approx(change, rel=1e-6)
        assert errors[name]["ratio"] == pytest.approx(error / change, rel=1e-6)
    run("verify", out)
    inspected = tiny.run("inspect", out)
    assert (inspected.status, inspected.err) == (0, "")
    argv = ("transfer", *folders, "-o", tmp_path / "told", "--requantize", "--alpha", "0.7")
    table = tiny.run(*argv, summary=True).out
    worst = max(told["requantized"], key=lambda each: each["ratio"])
    assert f"{worst['ratio']:.1%}" in table
    assert table.splitlines()[-1].endswith(worst["name"])


def test_threads_do_not_change_a_byte(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]]
) -> None:
    folders = save(tmp_path, weights, FP8)
    made = []
    for threads in ("1", "3"):
        out = tmp_path / f"threads-{threads}"
        run("transfer", *folders, "-o", out, "--requantize", "--threads", threads)
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_apply_gives_the_same_as_transfer(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]]
) -> None:
    folders = save(tmp_path, weights, FP8)
    run("extract", *folders[:2], "-o", tmp_path / "diff", "--diff-dtype", "float64")
    run("apply", tmp_path / "diff", folders[2], "-o", tmp_path / "two", "--requantize")
    run("transfer", *folders, "-o", tmp_path / "one", "--requantize")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_damaged_diff_vector_is_refused(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]]
) -> None:
    folders = save(tmp_path, weights, FP8)
    run("extract", *folders[:2], "-o", tmp_path / "diff")
    shard = tmp_path / "diff" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = tiny.run("apply", tmp_path / "diff", folders[2], "-o", tmp_path / "out", "--requantize")
    assert done.status == 1
    assert f"{UP} is damaged" in done.err
    assert not (tmp_path / "out").exists()


def test_values_that_are_too_large_for_the_scales_are_refused(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]]
) -> None:
    def half_scales(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**parts, "_scale": parts["_scale"].half()}

    coding = replace(INT4, parts=lambda tensor: half_scales(INT4.parts(tensor)))
    base = weights["base"]
    large = {**base, UP: base[UP] * 1e6}
    plain = [
        tiny.save_model(tmp_path / role, model, config=CONFIG)
        for role, model in (("finetuned", large), ("base", base))
    ]
    config = {**CONFIG, **coding.config}
    target = tiny.save_model(tmp_path / "target", coding.encode(base), config=config)
    done = tiny.run("transfer", *plain, target, "-o", tmp_path / "out", "--requantize")
    assert done.status == 2
    assert f"{UP} has values that are too large for the target's format" in done.err
    assert not (tmp_path / "out").exists()


def test_what_is_not_grafted_keeps_its_bytes(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]]
) -> None:
    folders = save(tmp_path, weights, FP8)
    target = load_file(folders[2] / "model.safetensors")
    scale = {"model.layers.0.mlp.up_proj.input_scale": torch.tensor(0.5)}
    config = {**CONFIG, **FP8.config}
    folders[2] = tiny.save_model(tmp_path / "static", {**target, **scale}, config=config)
    run("transfer", *folders, "-o", tmp_path / "kept", "--requantize", "--exclude", "up_proj")
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert kept["model.layers.0.mlp.up_proj.input_scale"] == 0.5
    for name in (UP, UP + "_scale_inv"):
        same = kept[name].view(torch.uint8), target[name].view(torch.uint8)
        assert torch.equal(*same), name
    assert kept.keys() == target.keys() | scale.keys()


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_names_and_buffers_of_a_wrapped_target(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]], wrapper: str
) -> None:
    folders = save(tmp_path, weights, FP8)
    run("transfer", *folders, "-o", tmp_path / "plain", "--requantize")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(3.0)}
    scale = {"model.layers.0.mlp.up_proj.input_scale": torch.tensor(0.5)}
    target = {**load_file(folders[2] / "model.safetensors"), **buffer, **scale}
    wrapped = {wrapper + name: tensor for name, tensor in target.items()}
    config = {**CONFIG, **FP8.config}
    folders[2] = tiny.save_model(tmp_path / "wrapped", wrapped, config=config)
    run("transfer", *folders, "-o", tmp_path / "out", "--requantize")
    found = load_file(tmp_path / "out" / "model.safetensors")
    due = {**load_file(tmp_path / "plain" / "model.safetensors"), **buffer, **scale}
    assert found.keys() == due.keys()
    for name, tensor in due.items():
        assert same_bits(found[name], tensor), name
    run("verify", tmp_path / "out")


def test_large_errors_are_warned_of(tmp_path: Path, weights: dict[str, dict[str, Tensor]]) -> None:
    base = weights["base"]
    tiny_step = {name: tensor + 1e-5 * torch.sign(tensor) for name, tensor in base.items()}
    folders = save(tmp_path, {"base": base, "finetuned": tiny_step, "target": base}, INT4)
    done = tiny.run("transfer", *folders, "-o", tmp_path / "out", "--requantize")
    assert done.status == 0
    # The steps of 4 bits are so coarse that base and finetuned decode to nearly the same values.
    assert "swallow the change" in done.err


@pytest.mark.parametrize(
    ("coding", "problem"),
    [(NF4_BLOCKS, "is stored as bitsandbytes, and cannot be written so"), (None, "is quantised")],
)
def test_what_cannot_be_requantized(
    tmp_path: Path,
    weights: dict[str, dict[str, Tensor]],
    coding: Coding | None,
    problem: str,
) -> None:
    folders = save(tmp_path, weights, FP8 if coding is None else coding)
    if coding is None:
        folders[2] = tiny.save_model(tmp_path / "plain", weights["target"], config=CONFIG)
    done = tiny.run("transfer", *folders, "-o", tmp_path / "out", "--requantize")
    assert done.status == 2
    assert problem in done.err
    assert not (tmp_path / "out").exists()


def test_nonfinite_values_have_no_code(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]]
) -> None:
    folders = save(tmp_path, weights, FP8)
    done = tiny.run(
        *("transfer", *folders, "-o", tmp_path / "out", "--requantize", "--allow-nonfinite")
    )
    assert done.status == 2
    assert "--requantize" in done.err


@pytest.mark.parametrize(
    ("value", "alpha", "told"),
    [
        (float("nan"), "1", "NaN in finetuned at [3, 4] (FILE); correct the checkpoint\n"),
        (3.0, "1e39", "overflows F32 in the output at [3, 4]; give a smaller --alpha\n"),
    ],
)
def test_the_remedy_for_nonfinite_values_is_no_option_that_is_refused(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]], value: float, alpha: str, told: str
) -> None:
    base = weights["base"]
    tuned = {**base, UP: base[UP].clone()}
    tuned[UP][3, 4] = value
    plain = [
        tiny.save_model(tmp_path / role, model, config=CONFIG)
        for role, model in (("finetuned", tuned), ("base", base))
    ]
    config = {**CONFIG, **FP8.config}
    target = tiny.save_model(tmp_path / "target", FP8.encode(base), config=config)
    argv = ("--requantize", "--alpha", alpha)
    done = tiny.run("transfer", *plain, target, "-o", tmp_path / "out", *argv)
    assert done.status == 1
    assert told.replace("FILE", str(plain[0] / "model.safetensors")) in done.err


def test_a_dry_run_says_that_steps_will_swallow_the_difference(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]]
) -> None:
    base = weights["base"]
    near = {name: tensor * 1.01 for name, tensor in base.items()}
    config = {**CONFIG, **INT4.config}
    plain = [
        tiny.save_model(tmp_path / role, model, config=CONFIG)
        for role, model in (("finetuned", near), ("base", base))
    ]
    target = tiny.save_model(tmp_path / "target", INT4.encode(base), config=config)
    run("extract", *plain, "-o", tmp_path / "diff")
    apply = ("apply", tmp_path / "diff", target, "-o", tmp_path / "out", "--dry-run")
    done = tiny.run(*apply, "--requantize")
    # A step of 1 %, and an error of 14 % of the weights.
    assert "are about 1400% of ‖α·Δ‖" in done.err
    assert "1400%" not in tiny.run(*apply, "--requantize", "--alpha", "100").err
    plain_run = tiny.run(*apply)
    assert "the target is quantised (compressed-tensors): the graft is written in" in (
        plain_run.err + plain_run.out
    )


def test_a_bad_value_in_a_block_of_several_chunks_is_told_alike_by_any_threads(
    tmp_path: Path,
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    wide = {name: torch.randn(128, 7168, generator=torch.Generator().manual_seed(5))}
    folders = save(tmp_path, dict.fromkeys(ROLES, wide), FP8)
    parts = load_file(folders[0] / "model.safetensors")
    codes = parts[name].view(torch.uint8)
    codes[60, 5], codes[127, 9] = 0x7F, 0x7F  # NaN
    folders[0] = tiny.save_model(tmp_path / "bad", parts, config={**CONFIG, **FP8.config})
    told = set()
    for threads in ("1", "2", "4", "4"):
        out = tmp_path / "out"
        done = tiny.run("transfer", *folders, "-o", out, "--requantize", "--threads", threads)
        assert done.status == 1
        told.add(done.err.splitlines()[-1])
    assert len(told) == 1, told
    assert "[60, 5]" in told.pop()


@pytest.mark.parametrize("coding", [FP8, INT4, INT8], ids=lambda coding: coding.name)
def test_the_bytes_that_are_told_are_those_that_are_read(
    tmp_path: Path,
    weights: dict[str, dict[str, Tensor]],
    coding: Coding,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = save(tmp_path, weights, coding)
    read: list[int] = []
    read_into = OpenShard.read_into

    def counted(self: OpenShard, buffer: memoryview, offset: int) -> None:
        read.append(len(buffer))
        read_into(self, buffer, offset)

    monkeypatch.setattr(OpenShard, "read_into", counted)
    argv = ("transfer", *folders, "-o", tmp_path / "out", "--requantize", "--json", "--threads")
    told = json.loads(run(*argv, "1"))["bytes_to_read"]
    # Rows that two chunks have in common are read twice, and samples are read to compare models.
    assert sum(read) == pytest.approx(told, rel=0.03)


def test_a_run_that_goes_on_knows_the_errors(
    tmp_path: Path, weights: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = save(tmp_path, weights, FP8)
    argv = ("transfer", *folders, "--requantize", "--json", "-o")
    whole = json.loads(run(*argv, tmp_path / "whole"))
    pwrite, written = os.pwrite, []

    def failing(fd: int, data: bytes, offset: int) -> int:
        if len(data) > 1 << 16:
            written.append(offset)
            if len(written) > 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        assert tiny.run(*argv, tmp_path / "out").status == 1
    rest = json.loads(run(*argv, tmp_path / "out"))
    assert rest["resumed_bytes"] > 0
    assert rest["requantized"] == whole["requantized"]
    made = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert made[0].read_bytes() == made[1].read_bytes()
