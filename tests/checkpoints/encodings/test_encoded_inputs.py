"""An encoded checkpoint gives the same results as its values stored plainly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from diffxfer.checkpoints.encodings import recognise
from tests import tiny
from tests.checkpoints.encodings import codings, scaled_halves
from tests.checkpoints.encodings.scaled_halves import SUFFIX

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

UP = "model.layers.0.mlp.up_proj.weight"
CONFIG = {**tiny.CONFIG, "vocab_size": 12, "hidden_size": 8}
ROLES = ("finetuned", "base", "target")
CODINGS = (codings.HALVES, codings.FP8, codings.INT4, codings.INT8, codings.NF4_DOUBLE)
"""With an `ENCODING`, its `encode`, `decode` and `config`: most tests run with each of them."""
HALVES = pytest.mark.parametrize("coding", [codings.HALVES], indirect=True, ids=["halves"])


@pytest.fixture(scope="module", params=CODINGS, ids=lambda coding: coding.name)
def coding(request: pytest.FixtureRequest):
    return request.param


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, coding) -> None:
    monkeypatch.setattr(recognise, "ENCODINGS", (coding.ENCODING,))


@pytest.fixture(scope="module")
def encoded(coding) -> dict[str, dict[str, Tensor]]:
    base = scaled_halves.example(1)
    models = {"base": base, "finetuned": scaled_halves.example(2, base)}
    models["target"] = scaled_halves.example(3, base)
    return {role: coding.encode(model) for role, model in models.items()}


@pytest.fixture
def save(tmp_path: Path, coding, encoded: Mapping[str, Mapping[str, Tensor]]):
    """Writes the three models; those that are named are encoded, the others plain."""

    def write(*named: str) -> tuple[Path, ...]:
        folders = []
        for role in ROLES:
            weights = encoded[role] if role in named else coding.decode(encoded[role])
            folder = tmp_path / f"{role}-{role in named}"
            if not folder.exists():
                said = coding.config if role in named else {}
                tiny.save_model(folder, weights, config={**CONFIG, **said})
            folders.append(folder)
        return tuple(folders)

    return write


def run(*argv: str | Path) -> str:
    done = tiny.run(*argv)
    assert done.status == 0, done.err
    return done.out


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        k: v
        for path in sorted(folder.glob("model*.safetensors"))
        for k, v in load_file(path).items()
    }


@pytest.mark.parametrize("named", [ROLES, ("finetuned",), ("base", "target")])
def test_a_transfer_has_the_same_bytes(save, tmp_path: Path, named: tuple[str, ...]) -> None:
    options = "--alpha", "0.7", "--out-dtype", "float32"
    run("transfer", *save(*named), "-o", tmp_path / "encoded", *options, "--threads", "2")
    run("transfer", *save(), "-o", tmp_path / "plain", *options, "--threads", "1")
    made, expected = tensors(tmp_path / "encoded"), tensors(tmp_path / "plain")
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(made[name].view(torch.int32), tensor.view(torch.int32)), name


def test_a_diff_vector_has_the_same_bytes_and_is_verified(save, tmp_path: Path) -> None:
    finetuned, base, target = save(*ROLES)
    plain = save()
    options = "--diff-dtype", "float32"
    run("extract", finetuned, base, "-o", tmp_path / "encoded", *options)
    run("extract", *plain[:2], "-o", tmp_path / "plain", *options)
    assert shards(tmp_path / "encoded") == shards(tmp_path / "plain")
    run("verify", tmp_path / "encoded", "--finetuned", finetuned, "--base", base)
    options = "--out-dtype", "float32"
    run("apply", tmp_path / "encoded", target, "-o", tmp_path / "graft", *options)
    run("apply", tmp_path / "plain", plain[2], "-o", tmp_path / "expected", *options)
    made, expected = tensors(tmp_path / "graft"), tensors(tmp_path / "expected")
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())


def test_inspect_describes_the_model_and_compares_values(save, coding) -> None:
    finetuned, base, _ = save(*ROLES)
    told = json.loads(run("inspect", base, "--json"))
    assert told["tensors"] == 5
    assert told["dtypes"] == {"F32": 12 * 8 * 2 + 600 * 1003 + 40 * 30 + 8}
    assert told["quantized"] is None
    assert told["encodings"] == [coding.ENCODING.format]
    assert "decoded from" in run("inspect", base)
    compared = json.loads(run("inspect", finetuned, base, "--json"))
    expected = json.loads(run("inspect", *save()[:2], "--json"))
    assert compared["norms"] == expected["norms"]
    assert compared["only_in_path"] == []


@HALVES
def test_a_missing_part_is_named(save, tmp_path: Path, encoded) -> None:
    finetuned, _, target = save(*ROLES)
    broken = tiny.save_model(
        tmp_path / "broken", {k: v for k, v in encoded["base"].items() if k != UP}, config=CONFIG
    )
    done = tiny.run("transfer", finetuned, broken, target, "-o", tmp_path / "out")
    assert done.status == 1
    assert f"{UP}{SUFFIX} has none to scale, expected {UP} in F16" in done.err


@HALVES
def test_a_value_that_is_not_finite_is_found_after_decoding(save, tmp_path: Path, encoded) -> None:
    finetuned, _, target = save(*ROLES)
    weights = dict(encoded["base"])
    weights[UP] = weights[UP].clone()
    weights[UP][400, 700] = torch.inf
    base = tiny.save_model(tmp_path / "infinite", weights, config=CONFIG)
    done = tiny.run("transfer", finetuned, base, target, "-o", tmp_path / "out")
    assert done.status == 1
    assert f"{UP}" in done.err
    assert "infinity in base at [400, 700]" in done.err
    assert not (tmp_path / "out").exists()


@HALVES
def test_a_graft_of_an_encoded_target_is_not_said_to_be_quantised(save, tmp_path: Path) -> None:
    models = save(*ROLES)
    stated = {"quant_method": "halves"}
    for folder in models:
        tiny.edit_json(
            folder / "config.json",
            lambda config: config.update(quantization_config=stated, text_config={}),
        )
    (models[2] / "hf_quant_config.json").write_text("{}")
    run("transfer", *models, "-o", tmp_path / "graft")
    assert "quantization_config" not in json.loads((tmp_path / "graft/config.json").read_text())
    assert not (tmp_path / "graft" / "hf_quant_config.json").exists()
    run("transfer", *models[:2], tmp_path / "graft", "-o", tmp_path / "next")


def test_work_is_counted_in_stored_bytes(save, encoded) -> None:
    told = json.loads(
        tiny.run("transfer", *save(*ROLES), "-o", "unused", "--dry-run", "--json").out
    )
    stored = sum(t.numel() * t.element_size() for m in encoded.values() for t in m.values())
    assert told["bytes_to_read"] == pytest.approx(stored, abs=100)


REAL = pytest.mark.parametrize(
    ("coding", "stored", "bits"),
    [
        (codings.FP8, "E4M3, blocks of 128 × 128", 8 + 32 * 5 * 8 / (600 * 1003)),
        (codings.INT4, "int4, a scale a row", 4 * 1008 / 1003 + 32 / 1003 + 128 / (600 * 1003)),
        (codings.INT8, "int8, a scale a row, zero points", 8 + 40 / 1003),
        (codings.NF4_DOUBLE, "nf4, blocks of 64, scales quantised too", 4 + 8 / 64 + 32 / 256),
    ],
    indirect=["coding"],
    ids=["fp8", "int4", "int8", "nf4"],
)


@REAL
def test_inspect_says_how_tensors_are_stored(save, stored: str, bits: float) -> None:
    _, base, _ = save(*ROLES)
    told = json.loads(run("inspect", base, "--json"))
    groups = {group["pattern"]: group for group in told["groups"] if group["shape"] == [600, 1003]}
    (group,) = groups.values()
    assert group["encoding"] == stored
    assert group["bits"] == pytest.approx(bits, abs=0.02)
    (norm,) = (group for group in told["groups"] if group["pattern"] == "model.norm.weight")
    assert (norm["encoding"], norm["bits"]) == ("", 32)
    assert told["bits_per_weight"] == pytest.approx(bits, abs=0.1)
    table = run("inspect", base)
    assert stored.partition(",")[0] in table
    assert "bits a weight with scales" in table


@REAL
def test_a_diff_vector_says_what_it_was_decoded_from(
    save, tmp_path: Path, coding, stored: str, bits: float
) -> None:
    finetuned, base, _ = save("finetuned")
    done = tiny.run("extract", finetuned, base, "-o", tmp_path / "diff", summary=True)
    said = f"decoded from {coding.ENCODING.format}"
    assert f"finetuned is {said}" in done.err + done.out
    assert f"base is {said}" not in done.err + done.out
    manifest = json.loads((tmp_path / "diff" / "diffxfer.json").read_text())
    assert manifest["sources"]["finetuned"]["decoded_from"] == [coding.ENCODING.format]
    assert manifest["sources"]["base"]["decoded_from"] == []
    card = (tmp_path / "diff" / "README.md").read_text()
    assert said.replace("(", r"\(").replace(")", r"\)") in card or said in card
    assert said in " ".join(run("inspect", tmp_path / "diff").split())
    told = json.loads(run("inspect", tmp_path / "diff", "--json"))
    assert (told["quantized"], told["encodings"], told["bits_per_weight"]) == (None, [], None)
