"""What `compare_checkpoints` says, against numpy's float64 on whole tensors."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffxfer import compare_checkpoints, extract_diff
from diffxfer.checkpoints.reader import open_weights
from diffxfer.diffs.inspection.measures import Measure
from diffxfer.errors import CheckpointError, HeaderError, OptionError
from diffxfer.streaming.completed import Completed
from diffxfer.streaming.engine import Engine
from diffxfer.streaming.plan import BLOCK_ELEMENTS, Operation, RunKind, TensorTask, make_plan, whole
from tests import families
from tests.helpers import to_bits, values

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from diffxfer.diffs.inspection.comparison import Comparison

UP = "model.layers.{}.mlp.up_proj.weight"
Q = "model.layers.{}.self_attn.q_proj.weight"


ROWS = ((600, 500), (60, 50), (800, 700), (60, 50))
"""The shapes of a matrix in each layer; some have more than one block."""


def changed(tensor: Tensor, seed: int) -> Tensor:
    """The same with two thirds of its elements changed, some of them by their sign alone."""
    other = values("F64", tuple(tensor.shape), seed).to(tensor.dtype)
    mask = torch.arange(tensor.numel()).reshape(tensor.shape) % 3 > 0
    return torch.where(mask, tensor + other * 0.125, tensor)


def pair_of_models() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ours: dict[str, Tensor] = {"model.embed_tokens.weight": values("BF16", (7, 450), 1)}
    for layer, dtype in enumerate(("BF16", "F16", "F32", "F64")):
        ours[UP.format(layer)] = values(dtype, ROWS[layer], 10 + layer)
        ours[Q.format(layer)] = values(dtype, (3, 4, 5), 20 + layer)
    ours["model.norm.weight"] = values("F32", (), 30)
    ours["model.none"] = torch.zeros(3, 0)
    theirs = {name: changed(tensor, 50 + at) for at, (name, tensor) in enumerate(ours.items())}
    theirs[UP.format(0)] = theirs[UP.format(0)].float()  # exact, so that a third is the same
    theirs[Q.format(3)] = -ours[Q.format(3)]
    theirs[Q.format(2)] = ours[Q.format(2)].clone()
    return ours, theirs


PAIR = pair_of_models()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models under the same names, cut into shards at other places."""
    root = tmp_path_factory.mktemp("pair")
    return (
        families.save_tensors(root / "a", PAIR[0], cuts=[2, 5]),
        families.save_tensors(root / "b", PAIR[1], cuts=[3]),
    )


def oracle(names: Mapping[str, str] | list[str]) -> dict[str, Any]:
    """The numbers of some tensors, from all their elements at once."""
    ours = [PAIR[0][name] for name in names]
    theirs = [PAIR[1][name] for name in names]
    a, b = (np.concatenate([t.double().numpy().ravel() for t in side]) for side in (ours, theirs))
    unchanged = 0
    for left, right in zip(ours, theirs, strict=True):
        same = to_bits(left) == to_bits(right) if left.dtype == right.dtype else left == right
        unchanged += int(same.sum())
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    return {
        "tensors": len(ours),
        "parameters": a.size,
        "delta": np.linalg.norm(b - a),
        "base": norm_a,
        "other": norm_b,
        "unchanged": unchanged,
        "cosine": None if not norm_a or not norm_b else (a @ b) / (norm_a * norm_b),
    }


def check(found: Measure | None, expected: dict[str, Any]) -> None:
    assert found is not None
    for name in ("tensors", "parameters", "unchanged"):
        assert getattr(found, name) == expected[name], name
    for name in ("delta", "base", "other"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-8), name
    if expected["cosine"] is None:
        assert found.cosine is None
    else:
        assert found.cosine == pytest.approx(expected["cosine"], abs=1e-8)


@pytest.fixture(scope="module")
def found(folders: tuple[Path, Path]) -> Comparison:
    return compare_checkpoints(*folders, threads=2)


class TestTheNumbers:
    def test_of_every_tensor(self, found: Comparison) -> None:
        assert {tensor.name for tensor in found.tensors} == PAIR[0].keys()
        for tensor in found.tensors:
            check(tensor.measure, oracle([tensor.name]))
            assert tensor.measure is not None
            assert tensor.unchanged == tensor.measure.unchanged
        by_name = {tensor.name: tensor for tensor in found.tensors}
        mixed = by_name[UP.format(0)]
        assert (mixed.dtype, mixed.other_dtype, mixed.shape) == ("BF16", "F32", (600, 500))
        assert mixed.unchanged >= 100_000
        turned, same = by_name[Q.format(3)].measure, by_name[Q.format(2)].measure
        assert turned is not None
        assert same is not None
        assert (turned.cosine, turned.ratio) == (pytest.approx(-1.0), pytest.approx(2.0))
        assert (same.cosine, same.delta, same.unchanged_share) == (1.0, 0.0, 1.0)

    def test_in_all_and_by_place(self, found: Comparison) -> None:
        check(found.norms, oracle(list(PAIR[0])))
        assert {(c.place.layer, c.place.kind) for c in found.cells} == {
            (-1, "embedding"),
            (-1, "norms"),
            (-1, "none"),
            *((layer, kind) for layer in range(4) for kind in ("q", "up")),
        }
        for cell in found.cells:
            name = {"q": Q, "up": UP}.get(cell.place.kind)
            outside = {"embedding": "model.embed_tokens.weight", "norms": "model.norm.weight"}
            chosen = name or outside.get(cell.place.kind, "model.none")
            check(cell.measure, oracle([chosen.format(cell.place.layer)]))

    def test_json_has_all_of_it(self, found: Comparison) -> None:
        value = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert value["norms"]["cosine"] == found.norms.cosine
        assert [t["name"] for t in value["tensors"]] == [t.name for t in found.tensors]
        assert value["tensors"][0]["finite"] is True
        assert len(value["cells"]) == len(found.cells)

    def test_the_other_way_round(self, found: Comparison, folders: tuple[Path, Path]) -> None:
        back = compare_checkpoints(folders[1], folders[0])
        assert (back.norms.delta, back.norms.base) == (found.norms.delta, found.norms.other)
        assert back.norms.unchanged == found.norms.unchanged
        assert back.norms.cosine == found.norms.cosine


@settings(max_examples=8)
@given(threads=st.integers(1, 5), blocks=st.integers(1, 3))
def test_threads_and_chunks_change_no_bit(
    folders: tuple[Path, Path], found: Comparison, threads: int, blocks: int
) -> None:
    ours, theirs = (open_weights(folder).tensors for folder in folders)
    tasks = [
        TensorTask(
            name, Operation.CONTRAST, (spec, theirs[name]), spec.dtype, spec.shape,
            runs=whole(RunKind.GRAFT, 2),
        )
        for name, spec in ours.items()
    ]  # fmt: skip
    plan = make_plan(tasks, ())
    chunk = blocks * BLOCK_ELEMENTS
    engine = Engine(
        *(plan, {}, {}, Completed(plan, chunk, None)),
        chunk_elements=chunk,
        allow_nonfinite=True,
    )
    results = engine.run(threads, None, None)
    once = {tensor.name: tensor.measure for tensor in found.tensors}
    for task, result in zip(plan.tasks, results, strict=True):
        assert once[task.name] == Measure(
            *(1, task.elements, result.delta_norm, result.base_norm),
            result.unchanged,
            result.other_norm,
        )


class TestWhatCannotBeCompared:
    def compare(self, tmp_path: Path, *sides: dict[str, Tensor]) -> Comparison:
        a, b = (families.save_tensors(tmp_path / n, t) for n, t in zip("ab", sides, strict=True))
        return compare_checkpoints(a, b)

    def test_other_shapes_and_tensors_that_one_lacks_are_listed(self, tmp_path: Path) -> None:
        ours = {"x": torch.ones(3), "grown": torch.ones(2, 3), "mine": torch.ones(1)}
        theirs = {"x": torch.ones(3), "grown": torch.ones(4, 3), "yours": torch.ones(1)}
        found = self.compare(tmp_path, ours, theirs)
        (unlike,) = found.unlike
        assert dataclasses.astuple(unlike) == ("grown", "F32 (2, 3)", "F32 (4, 3)")
        assert (found.only_in_path, found.only_in_other) == (("mine",), ("yours",))
        assert [tensor.name for tensor in found.tensors] == ["x"]

    def test_integers_and_codes_are_compared_as_bytes(self, tmp_path: Path) -> None:
        ours = {
            "i": torch.arange(4),
            "b": torch.tensor([True, False]),
            "f8": torch.ones(300_000).to(torch.float8_e4m3fn),
            "mixed": torch.ones(2),
        }
        theirs = {**ours, "i": torch.tensor([0, 1, 2, 259]), "mixed": torch.ones(2).int()}
        found = self.compare(tmp_path, ours, theirs)
        assert {each.name: dataclasses.astuple(each)[1:] for each in found.bytes_compared} == {
            "i": ("I64", 32, 31),
            "b": ("BOOL", 2, 2),
            "f8": ("F8_E4M3", 300_000, 300_000),
        }
        assert [each.name for each in found.unlike] == ["mixed"]
        assert (found.tensors, found.norms) == ((), Measure(0, 0, 0.0, 0.0, 0))

    @pytest.mark.parametrize("odd", [float("nan"), float("inf")])
    @pytest.mark.parametrize("both", [False, True])
    def test_what_is_not_finite_is_in_no_norm(self, tmp_path: Path, odd: float, both: bool) -> None:
        bad = torch.tensor([1.0, odd, 3.0])
        ours = {"bad": bad, "good": torch.tensor([3.0, 4.0])}
        theirs = {"bad": bad if both else torch.ones(3), "good": torch.tensor([3.0, 5.0])}
        found = self.compare(tmp_path, ours, theirs)
        assert found.nonfinite == ("bad",)
        check = {tensor.name: tensor for tensor in found.tensors}
        assert check["bad"].measure is None
        assert check["bad"].unchanged == (3 if both else 1)
        assert (found.norms.tensors, found.norms.delta, found.norms.base) == (1, 1.0, 5.0)
        assert '"finite": false' in json.dumps(found.as_json(), allow_nan=False)

    def test_nothing_is_not_the_same_file_as_nothing(self, tmp_path: Path) -> None:
        found = self.compare(tmp_path, {}, {})
        assert (found.tensors, found.warnings) == ((), ())

    def test_prefixes_are_seen_through(self, tmp_path: Path) -> None:
        ours = {"model.layers.0.x.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
        theirs = {"layers.0.x.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
        found = self.compare(tmp_path, ours, theirs)
        assert {t.name: t.other_name for t in found.tensors} == {
            "model.layers.0.x.weight": "layers.0.x.weight",
            "lm_head.weight": "lm_head.weight",
        }
        assert found.only_in_path == found.only_in_other == ()

    def test_prefixes_that_mean_two_things_are_left_alone(self, tmp_path: Path) -> None:
        ours = {"x.weight": torch.ones(2), "model.x.weight": torch.ones(2)}
        theirs = {
            "x.weight": torch.ones(2),
            "transformer.x.weight": torch.ones(2),
            "y": ours["x.weight"],
        }
        found = self.compare(tmp_path, ours, theirs)
        assert [tensor.name for tensor in found.tensors] == ["x.weight"]
        assert found.warnings[0].startswith("only tensors with equal names are compared: ")

    def test_zeros_have_no_angle(self, tmp_path: Path) -> None:
        found = self.compare(tmp_path, {"x": torch.zeros(2)}, {"x": torch.ones(2)})
        assert (found.norms.cosine, found.norms.ratio) == (None, float("inf"))
        assert found.as_json()["norms"]["ratio"] is None


def test_small_changes_keep_their_digits(tmp_path: Path) -> None:
    """1 − cosine is 5e-13 here: a product of A and B would have lost it."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(100_000, generator=generator, dtype=torch.float64)
    b = a + torch.randn(100_000, generator=generator, dtype=torch.float64) * 1e-6
    for name, tensor in (("a", a), ("b", b)):
        families.save_tensors(tmp_path / name, {"x": tensor})
    found = compare_checkpoints(tmp_path / "a", tmp_path / "b").norms
    assert found.delta == pytest.approx(float((b - a).norm()), rel=1e-8)
    assert found.cosine is not None
    assert 1 - found.cosine == pytest.approx(5e-13, rel=0.02)


def test_two_diff_vectors(folders: tuple[Path, Path], tmp_path: Path) -> None:
    names = [name for name in PAIR[0] if PAIR[0][name].numel()]
    for number in (1, 2):
        other = {name: PAIR[0][name] * (1 + number) for name in names}
        families.save_tensors(tmp_path / f"f{number}", other)
        base = families.save_tensors(tmp_path / f"b{number}", {n: PAIR[0][n] for n in names})
        extract_diff(tmp_path / f"f{number}", base, tmp_path / f"d{number}")
    found = compare_checkpoints(tmp_path / "d1", tmp_path / "d2")
    assert found.norms.cosine == pytest.approx(1.0, abs=1e-4)  # they are rounded to 16 bits
    assert found.norms.ratio == pytest.approx(1.0, abs=1e-3)
    assert found.warnings == ()
    mixed = compare_checkpoints(tmp_path / "d1", folders[0])
    assert mixed.warnings == (
        f"{tmp_path / 'd1'} is a diff vector, but the other one is a complete model",
    )


def test_inputs_are_left_as_they_are_and_progress_is_told(folders: tuple[Path, Path]) -> None:
    before = families.fingerprints(*folders)
    told: list[tuple[int, int]] = []
    found = compare_checkpoints(*folders, progress=lambda done, total: told.append((done, total)))
    assert families.fingerprints(*folders) == before
    assert told[-1] == (found.bytes_read, found.bytes_read)
    assert compare_checkpoints(folders[0], folders[0]).warnings == ("A and B are the same files",)


def test_what_is_no_checkpoint_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        compare_checkpoints(folders[0], tmp_path / "nothing")
    with pytest.raises(OptionError, match="--threads"):
        compare_checkpoints(*folders, threads=0)
    broken = shutil.copytree(folders[1], tmp_path / "broken")
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(HeaderError, match="truncated"):
        compare_checkpoints(folders[0], broken)
