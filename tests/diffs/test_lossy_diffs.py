"""`extract --pack int8` and `int4`: small, near, and open about what is lost."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffxfer import (
    apply_diff,
    compare_checkpoints,
    extract_diff,
    inspect_checkpoint,
    transfer,
    verify,
)
from diffxfer import family as shipped
from diffxfer.errors import DamageError, NonFiniteError, OptionError
from diffxfer.streaming.plan import BLOCK_ELEMENTS
from tests import tiny
from tests.diffs.test_packed_diffs import assert_same, bits, drawn, odd_pair, weights
from tests.families import WORDS, fast_tokenizer, llama, save_model, save_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

FAMILY = Path(shipped.__file__).parent
FORMS = ("int8", "int4")


def unpacked(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor, by the ten lines of the card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 10
    known: dict[str, Any] = {}
    exec(code, known)
    entries, made = manifest(folder)["tensors"], {}
    for name, raw in weights(folder).items():
        made[name] = np.zeros(entries[name]["shape"])
        known["unpack"](raw.numpy(), made[name])
    return made


def manifest(folder: Path) -> Any:
    return json.loads((folder / "diffxfer.json").read_text())


@cache
def wide_pair() -> dict[str, tuple[Tensor, Tensor]]:
    """Besides the odd ones, matrices whose rows are long enough to be rounded."""
    rows = BLOCK_ELEMENTS // 999 + 3
    shapes = {"odd": (7, 33), "cut": (rows, 999), "experts": (3, 5, 40), "row": (1, 32)}
    found = {}
    for name, shape in shapes.items():
        base = drawn(*shape, scale=0.02)
        found[name] = ((base + drawn(*shape, scale=1e-3)).bfloat16(), base.bfloat16())
    found["same"] = (found["odd"][1], found["odd"][1])
    found["wider"] = (drawn(8, 64), drawn(8, 64).bfloat16())
    large = torch.full((2, 32), 1e100, dtype=torch.float64)
    found["large"] = (large, -large)
    return found


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    pairs = {**odd_pair(), **{f"wide_{name}": pair for name, pair in wide_pair().items()}}
    for place, role in enumerate(("finetuned", "base")):
        found = {f"model.{name}.weight": pair[place].clone() for name, pair in pairs.items()}
        tiny.save_model(root / role, found, sharded=True)
    for form in FORMS:
        extract_diff(root / "finetuned", root / "base", root / form, pack=form)
    return root


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    for form in ("exact", *FORMS):
        extract_diff(FAMILY / "finetuned", FAMILY / "base", root / form, pack=form)
    return root


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def exact(roles: Path) -> dict[str, np.ndarray[Any, Any]]:
    ours, theirs = weights(roles / "finetuned"), weights(roles / "base")
    return {name: (ours[name].double() - theirs[name].double()).numpy() for name in ours}


def test_size_and_error(family: Path, form: str) -> None:
    whole = (FAMILY / "finetuned" / "model.safetensors").stat().st_size
    share = (family / form / "model.safetensors").stat().st_size / whole
    assert share < {"int8": 0.49, "int4": 0.24}[form]
    assert manifest(family / form)["lossy"]["error"] < {"int8": 0.007, "int4": 0.11}[form]


@pytest.mark.parametrize("which", ["odd", "family"])
def test_the_card_decodes_what_the_commands_decode(
    which: str, form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(which)
    roles = root if which == "odd" else FAMILY
    apply_diff(root / form, roles / "base", tmp_path / "back", threads=2)
    back, base, found = weights(tmp_path / "back"), weights(roles / "base"), unpacked(root / form)
    for name, delta in found.items():
        expected = (base[name].double() + torch.from_numpy(delta)).to(base[name].dtype)
        assert torch.equal(bits(back[name]), bits(expected)), name


@pytest.mark.parametrize("which", ["odd", "family"])
def test_the_errors_are_those_of_the_values(
    which: str, form: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(which)
    found, entries = unpacked(root / form), manifest(root / form)["tensors"]
    errors = {}
    for name, delta in exact(root if which == "odd" else FAMILY).items():
        errors[name] = np.linalg.norm(found[name] - delta), np.linalg.norm(delta)
        recorded = entries[name].get("error_norm", 0.0)
        assert recorded == pytest.approx(errors[name][0], rel=1e-7), name
    lost = manifest(root / form)["lossy"]
    ratios = {name: error / size for name, (error, size) in errors.items() if size}
    assert lost["worst"] == pytest.approx(max(ratios.values()))
    assert lost["worst_tensor"] == max(ratios, key=lambda name: ratios[name])
    error, size = (math.hypot(*column) for column in zip(*errors.values(), strict=True))
    assert lost["error"] == pytest.approx(error / size)
    layers = {re.sub(r"(.*\d+)\..*|(.*)\.[^.]*", r"\1\2", name) for name in entries}
    assert {*lost["layers"]} == layers


def test_what_is_rounded(odd: Path, form: str) -> None:
    """Matrices; not vectors, short rows, and what is too large."""
    entries, found = manifest(odd / form)["tensors"], unpacked(odd / form)
    rounded = {name.split(".")[1] for name, each in entries.items() if "error_norm" in each}
    assert rounded == {
        *(f"wide_{name}" for name in wide_pair()),
        *("bfloat16", "float16", "float32", "float64", "mixed", "wider", "equal"),
    } - {name for name, (ours, _) in odd_pair().items() if ours.ndim < 2 or ours.shape[-1] < 32}
    for name, delta in exact(odd).items():
        if name.split(".")[1] not in rounded - {"wide_large"}:
            assert found[name].tobytes() == delta.tobytes(), name
            assert entries[name].get("inexact", 0) == 0


def test_the_report(odd: Path, form: str, tmp_path: Path) -> None:
    pair = odd / "finetuned", odd / "base"
    report = extract_diff(*pair, tmp_path / "out", pack=form, threads=3, overwrite=True)
    assert all(f".{name}." not in "".join(report.inexact) for name in ("bfloat16", "wide_odd"))
    told = report.as_json()["lossy"]
    lost = manifest(odd / form)["lossy"]
    assert told["ratio"] == lost["error"]
    assert told["worst"] == lost["worst_tensor"]
    assert {layer["name"]: layer["ratio"] for layer in told["layers"]} == lost["layers"]
    assert len(told["tensors"]) == len(manifest(odd / form)["tensors"])
    for path in sorted((odd / form).glob("*.safetensors")):  # the number of threads is no matter
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_exact_one_is_not_lossy(family: Path) -> None:
    assert "lossy" not in manifest(family / "exact")
    assert verify(family / "exact").lossy is None
    assert inspect_checkpoint(family / "exact").lossy == ()
    comparison = compare_checkpoints(family / "exact", family / "int8").norms
    lost = manifest(family / "int8")["lossy"]
    assert comparison.delta / comparison.base == pytest.approx(lost["error"])


def test_levels_change_no_value(family: Path, tmp_path: Path, form: str) -> None:
    pair = FAMILY / "finetuned", FAMILY / "base"
    extract_diff(*pair, tmp_path / "l9", pack=form, pack_level=9)
    assert compare_checkpoints(family / form, tmp_path / "l9").norms.delta == 0


@pytest.mark.parametrize("which", ["odd", "family"])
def test_verify(which: str, form: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(which)
    roles = root if which == "odd" else FAMILY
    lost = manifest(root / form)["lossy"]
    for given in ({}, {"base": roles / "base", "finetuned": roles / "finetuned"}):
        found = verify(root / form, **given)
        assert found.lossy == form
        assert found.as_json()["distances"]["ratio"] == pytest.approx(lost["error"], rel=1e-6)
        assert found.as_json()["distances"]["worst"] == lost["worst_tensor"]
    assert found.restored is not None
    assert found.restored.inexact


def test_verify_refuses_another_fine_tune(family: Path, form: str) -> None:
    with pytest.raises(DamageError, match="39 problems") as caught:
        verify(family / form, base=FAMILY / "base", finetuned=FAMILY / "target")
    assert any("but the manifest says" in each.problem for each in caught.value.damage)


def test_the_difference_of_an_adapter(tmp_path: Path, form: str) -> None:
    """Its Δ is known before the sum with base is rounded, so the errors differ a little."""
    pair = FAMILY / "adapter", FAMILY / "base"
    extract_diff(*pair, tmp_path / "packed", pack=form)
    found = verify(tmp_path / "packed", base=pair[1], finetuned=pair[0]).as_json()["distances"]
    recorded = manifest(tmp_path / "packed")["lossy"]["error"]
    assert found["ratio"] != recorded
    assert found["ratio"] == pytest.approx(recorded, abs=0.01)


def test_damage_is_found(family: Path, form: str, tmp_path: Path) -> None:
    shutil.copytree(family / form, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    name, raw = next(iter(load_file(path).items()))
    data = bytearray(path.read_bytes())
    data[data.index(raw.numpy().tobytes()) + len(raw) // 2] ^= 1
    path.write_bytes(data)
    for given in ({}, {"base": FAMILY / "base", "finetuned": FAMILY / "finetuned"}):
        with pytest.raises(DamageError) as caught:
            verify(tmp_path / "bad", **given)
        assert [each.tensor for each in caught.value.damage] == [name]
    with pytest.raises(Exception, match=re.escape(name)):
        apply_diff(tmp_path / "bad", FAMILY / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect(family: Path, form: str) -> None:
    found = inspect_checkpoint(family / form)
    assert found.encodings == (f"packed {form}",)
    assert found.inexact is None
    assert found.bits_per_weight is not None
    assert found.bits_per_weight < {"int8": 7.7, "int4": 3.7}[form]
    assert {group.encoding for group in found.groups} == {form, "packed"}
    assert found.as_json()["lossy"]["ratio"] == manifest(family / form)["lossy"]["error"]


def test_values_that_are_not_finite(tmp_path: Path, form: str) -> None:
    """They are refused; if they are allowed, their block is exact."""
    finetuned, base = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    finetuned[1, 2:4] = torch.tensor([math.nan, -math.inf])
    for role, tensor in (("finetuned", finetuned), ("base", base)):
        tiny.save_model(tmp_path / role, {"w": tensor})
    pair = tmp_path / "finetuned", tmp_path / "base"
    options: dict[str, Any] = {"pack": form, "allow_unrelated": True}
    with pytest.raises(NonFiniteError):
        extract_diff(*pair, tmp_path / "packed", **options)
    extract_diff(*pair, tmp_path / "packed", allow_nonfinite=True, **options)
    apply_diff(tmp_path / "packed", pair[1], tmp_path / "back", allow_nonfinite=True)
    back = weights(tmp_path / "back")["w"]
    assert back[1, 2].isnan()
    assert torch.equal(back.nan_to_num(), finetuned.nan_to_num())
    assert verify(tmp_path / "packed", base=pair[1], finetuned=pair[0]).lossy == form


def test_rows_of_added_tokens_are_exact(tmp_path: Path, form: str) -> None:
    specials = {"base": ("<s>", "<gone>"), "finetuned": ("<s>", "<new>", "<newer>")}
    for seed, (role, names) in enumerate(specials.items()):
        config = llama(vocab_size=len(WORDS) + len(names), hidden_size=32)
        folder = save_model(tmp_path / role, config, seed)
        save_tokenizer(folder, fast_tokenizer(names), bos_token="<s>")
    pair = tmp_path / "finetuned", tmp_path / "base"
    extract_diff(*pair, tmp_path / "packed", pack=form, vocab="tokens", allow_unrelated=True)
    found, finetuned = unpacked(tmp_path / "packed"), weights(pair[0])
    ids = [int(each) for each in manifest(tmp_path / "packed")["tokens"]["added"]]
    assert ids
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (found[name][ids] == finetuned[name][ids].double().numpy()).all()
    assert verify(tmp_path / "packed", base=pair[1], finetuned=pair[0]).lossy == form


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"pack": "int5"}, "'int5' is unknown; use one of exact, int8, int4"),
        ({"pack": ""}, "'' is unknown"),
        ({"pack": "int4", "diff_dtype": "float32"}, "int4 says how a difference is stored"),
        ({"pack": "int4", "as_": "lora"}, "cannot be used with --as lora"),
        ({"pack": "int8", "pack_level": 0}, "0 is no level of compression"),
    ],
)
def test_options(odd: Path, tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=re.escape(problem)):
        extract_diff(odd / "finetuned", odd / "base", tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (["--pack", "FT", "BASE", "-o", "OUT"], "exact"),
        (["FT", "BASE", "-o", "OUT", "--pack"], "exact"),
        (["FT", "BASE", "--pack", "-o", "OUT"], "exact"),
        (["-o", "OUT", "--pack", "-q", "--", "FT", "BASE"], "exact"),
        (["FT", "BASE", "-o", "OUT", "--pack", "exact"], "exact"),
        (["FT", "BASE", "--pack", "int4", "-o", "OUT"], "int4"),
        (["--pack=int8", "FT", "BASE", "-o", "OUT"], "int8"),
    ],
)
def test_the_option_needs_no_value(tmp_path: Path, given: list[str], form: str) -> None:
    places = {"FT": FAMILY / "finetuned", "BASE": FAMILY / "base", "OUT": tmp_path / "out"}
    done = tiny.run("extract", *(str(places.get(arg, arg)) for arg in given), summary=True)
    assert done.status == 0, done.err
    assert manifest(tmp_path / "out")["command"]["pack"] == form


def test_what_the_commands_say(family: Path, tmp_path: Path) -> None:
    pair = str(FAMILY / "finetuned"), str(FAMILY / "base")
    done = tiny.run("extract", *pair, "-o", str(tmp_path / "out"), "--pack", "int4", summary=True)
    lost = manifest(family / "int4")["lossy"]
    said = (
        f"‖error‖ is {lost['error']:.2%} of ‖Δ‖, and at most {lost['worst']:.2%}, in"
        f" {lost['worst_tensor']}"
    )
    assert f"lossy: {said}\n" in done.err
    for layer, ratio in lost["layers"].items():
        assert re.search(rf"^{re.escape(layer)} +{ratio:.2%} ", done.out, re.MULTILINE)
    done = tiny.run("verify", str(tmp_path / "out"))
    recorded = "lossy (int4): base + Δ is near finetuned, as its manifest records it"
    assert f"{recorded}: {said}\n" in done.out
    done = tiny.run("verify", str(tmp_path / "out"), "--base", pair[1], "--finetuned", pair[0])
    assert f"lossy (int4): base + Δ is near finetuned: {said}\n" in done.out
    assert done.status == 0
    done = tiny.run("inspect", str(tmp_path / "out"))
    assert said in " ".join(done.out.split())
    assert "packed int4; 3.6" in done.out


def test_a_lossy_graft_is_near_the_exact_one(family: Path, tmp_path: Path, form: str) -> None:
    roles = (FAMILY / role for role in ("finetuned", "base", "target"))
    transfer(*roles, tmp_path / "exact", alpha=0.7)
    apply_diff(family / form, FAMILY / "target", tmp_path / "near", alpha=0.7)
    apply_diff(family / "exact", FAMILY / "target", tmp_path / "packed", alpha=0.7)
    assert_same(tmp_path / "exact", tmp_path / "packed")
    off = compare_checkpoints(tmp_path / "exact", tmp_path / "near").norms.delta
    moved = compare_checkpoints(tmp_path / "exact", FAMILY / "target").norms.delta
    assert 0 < off / moved < {"int8": 0.01, "int4": 0.12}[form]


@pytest.mark.slow
def test_int4_keeps_the_score(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from score_family import accuracy

    scores = {}
    for form in ("exact", *FORMS):
        apply_diff(family / form, FAMILY / "target", tmp_path / form)
        scores[form] = accuracy(tmp_path / form)
    assert scores["exact"] > 0.95
    assert min(scores.values()) > scores["exact"] - 0.01
