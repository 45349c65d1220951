"""What `inspect_checkpoint` says, against the tensors themselves."""

from __future__ import annotations

import json
import shutil
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer import apply_diff, extract_diff, inspect_checkpoint
from diffxfer.diffs.inspection.measures import Measure, total
from diffxfer.errors import ArtifactError, CheckpointError, HeaderError
from tests import families, tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

UP = "model.layers.{}.mlp.up_proj.weight"
Q = "model.layers.{}.self_attn.q_proj.weight"


def model(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (7, 4), "model.norm.weight": (4,)}
    for layer in range(3):
        shapes |= {UP.format(layer): (6, 4), Q.format(layer): (4, 4)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.bfloat16() for name, tensor in made.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A family in which some elements of finetuned are base's, and its diff vector."""
    root = tmp_path_factory.mktemp("family")
    base, finetuned = model(0), model(1)
    for at, (name, tensor) in enumerate(finetuned.items()):
        tensor.view(-1)[at:9] = base[name].view(-1)[at:9]
    steps = {"model.steps": torch.arange(3)}
    found = {
        "base": families.save_tensors(root / "base", base | steps, {"model_type": "tiny"}),
        "finetuned": families.save_tensors(root / "sft", finetuned | steps, cuts=[3, 6]),
        "target": families.save_tensors(root / "target", model(2) | steps),
    }
    (found["finetuned"] / "generation_config.json").write_text("{}")
    extract_diff(found["finetuned"], found["base"], root / "diff", exclude=["norm"])
    apply_diff(root / "diff", found["target"], root / "graft", alpha=0.5)
    return found | {"diff": root / "diff", "graft": root / "graft"}


def wide(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= {
            n: t.double().numpy() for n, t in load_file(shard).items() if t.is_floating_point()
        }
    return tensors


def oracle(folders: dict[str, Path], names: list[str]) -> Measure:
    """The measure of some tensors, from all their elements at once."""
    ours, theirs = wide(folders["finetuned"]), wide(folders["base"])
    a = np.concatenate([ours[name].reshape(-1) for name in names])
    b = np.concatenate([theirs[name].reshape(-1) for name in names])
    norms = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    return Measure(len(names), a.size, *norms, int((a == b).sum()))


def same(found: Measure | None, expected: Measure) -> bool:
    return (
        found is not None
        and (found.tensors, found.parameters) == (expected.tensors, expected.parameters)
        and found.unchanged == expected.unchanged
        and found.delta == pytest.approx(expected.delta, rel=1e-8)
        and found.base == pytest.approx(expected.base, rel=1e-8)
        and found.ratio == pytest.approx(expected.ratio, rel=1e-8)
    )


class TestADiffVector:
    def test_its_norms_are_those_of_the_difference(self, folders: dict[str, Path]) -> None:
        found = inspect_checkpoint(folders["diff"])
        names = [name for name in wide(folders["base"]) if "norm" not in name]
        assert same(found.norms, oracle(folders, names))
        assert {(c.place.stack, c.place.layer, c.place.kind) for c in found.cells} == {
            ("", -1, "embedding"),
            *(("layers", layer, kind) for layer in range(3) for kind in ("q", "up")),
        }
        for cell in found.cells:
            layer = cell.place.layer
            name = {"q": Q, "up": UP}.get(cell.place.kind, "model.embed_tokens.weight")
            assert same(cell.measure, oracle(folders, [name.format(layer)]))

    def test_what_it_was_made_from_and_how(self, folders: dict[str, Path]) -> None:
        found = inspect_checkpoint(folders["diff"])
        assert (found.kind, found.tensors, found.parameters) == ("diff", 7, 28 + 3 * 40)
        assert {role: source.name for role, source in found.sources.items()} == {
            "finetuned": "sft",
            "base": "base",
        }
        assert found.options["exclude"] == ["norm"]
        assert found.integers == ("model.steps",)
        assert found.left_out == ("model.norm.weight",)
        assert found.companions == ("config.json", "generation_config.json")
        assert found.inexact is not None
        assert found.warnings == ()

    def test_one_that_an_older_version_wrote(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        old = shutil.copytree(folders["diff"], tmp_path / "old")
        manifest = json.loads((old / "diffxfer.json").read_text("utf-8"))
        for entry in manifest["tensors"].values():
            del entry["unchanged"]
        (old / "diffxfer.json").write_text(json.dumps(manifest))
        found = inspect_checkpoint(old)
        assert found.norms is not None
        assert (found.norms.unchanged, found.norms.unchanged_share) == (None, None)
        assert found.norms.delta == inspect_checkpoint(folders["diff"]).norms.delta  # type: ignore[union-attr]
        apply_diff(old, folders["target"], tmp_path / "graft", alpha=0.5)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *product(("delta_norm", "base_norm"), (float("nan"), float("inf"), -1, 1.4e154)),
            *product(("unchanged", "inexact"), (-1,)),
        ],
    )
    def test_numbers_that_no_tensor_has_are_refused(
        self, folders: dict[str, Path], tmp_path: Path, key: str, value: float
    ) -> None:
        bad = shutil.copytree(folders["diff"], tmp_path / "bad")
        manifest = json.loads((bad / "diffxfer.json").read_text("utf-8"))
        next(iter(manifest["tensors"].values()))[key] = value
        (bad / "diffxfer.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match=rf"is not a valid manifest .*{key}"):
            inspect_checkpoint(bad)

    @pytest.mark.parametrize("value", [float("nan"), {"norm": float("inf")}])
    def test_so_are_options_that_nobody_can_give(
        self, folders: dict[str, Path], tmp_path: Path, value: object
    ) -> None:
        bad = shutil.copytree(folders["graft"], tmp_path / "bad")
        manifest = json.loads((bad / "diffxfer.json").read_text("utf-8"))
        manifest["command"]["alpha"] = value
        (bad / "diffxfer.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match=r"is not a valid manifest .*alpha"):
            inspect_checkpoint(bad)

    def test_weights_are_not_read(self, folders: dict[str, Path], tmp_path: Path) -> None:
        copy = shutil.copytree(folders["diff"], tmp_path / "copy")
        for shard in copy.glob("model*.safetensors"):
            raw = shard.read_bytes()
            data = 8 + int.from_bytes(raw[:8], "little")
            shard.write_bytes(raw[:data] + bytes(len(raw) - data))
        assert inspect_checkpoint(copy).cells == inspect_checkpoint(folders["diff"]).cells

    def test_shards_of_another_one_are_told_of(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        copy = shutil.copytree(folders["diff"], tmp_path / "copy")
        shard = next(copy.glob("model*.safetensors"))
        tensors = load_file(shard)
        save_file({name + "x": tensor for name, tensor in tensors.items()}, shard)
        (copy / tiny.INDEX).unlink(missing_ok=True)
        shards = sorted(path.name for path in copy.glob("model*.safetensors"))
        placed = {n: s for s in shards for n in load_file(copy / s)}
        (copy / tiny.INDEX).write_text(json.dumps({"weight_map": placed}))
        found = inspect_checkpoint(copy)
        assert f"{shard.name} is not the shard that the manifest names" in found.warnings
        assert any("do not name the same tensors" in line for line in found.warnings)

    def test_a_difference_that_is_no_number_is_left_out_of_the_norms(self, tmp_path: Path) -> None:
        ours = {"a.weight": torch.tensor([1.0, float("nan")]), "b.weight": torch.ones(2)}
        theirs = {"a.weight": torch.ones(2), "b.weight": torch.zeros(2)}
        roles = [families.save_tensors(tmp_path / n, t) for n, t in (("f", ours), ("b", theirs))]
        extract_diff(roles[0], roles[1], tmp_path / "diff", allow_nonfinite=True)
        found = inspect_checkpoint(tmp_path / "diff")
        assert found.norms is not None
        assert found.norms.delta == pytest.approx(2**0.5)
        assert found.norms.ratio == float("inf")
        assert found.warnings == ("left out of the norms because they are not finite: a.weight",)
        assert json.loads(json.dumps(found.as_json(), allow_nan=False))["norms"]["ratio"] is None


class TestACheckpoint:
    def test_of_any_origin(self, folders: dict[str, Path]) -> None:
        found = inspect_checkpoint(str(folders["finetuned"]))
        shards = sorted(folders["finetuned"].glob("*.safetensors"))
        assert (found.kind, found.tensors) == ("checkpoint", 9)
        assert found.parameters == 28 + 4 + 3 * 40 + 3
        assert found.dtypes == {"BF16": 152, "I64": 3}
        assert found.shards == {path.name: path.stat().st_size for path in shards}
        assert len(shards) == 3
        assert found.companions == ("config.json", "generation_config.json")
        assert (found.architecture, found.quantized, found.sources) == ("tiny", None, {})
        assert (found.norms, found.cells, found.written_by) == (None, (), None)
        group = next(group for group in found.groups if "q_proj" in group.pattern)
        assert (group.pattern, group.tensors, group.parameters) == (Q.format("*"), 3, 48)
        assert (group.dtype, group.shape) == ("BF16", (4, 4))

    def test_a_graft_says_what_was_grafted_on_what(self, folders: dict[str, Path]) -> None:
        found = inspect_checkpoint(folders["graft"])
        assert found.kind == "graft"
        assert found.sources["target"].name == "target"
        assert found.sources["diff vector"].made_from["base"].name == "base"
        assert found.options["alpha"] == 0.5
        assert found.cells == ()

    def test_without_a_config(self, tmp_path: Path) -> None:
        folder = families.save_tensors(tmp_path / "bare", {"x": torch.zeros(())})
        (folder / "config.json").unlink()
        found = inspect_checkpoint(folder)
        assert (found.architecture, found.parameters, found.companions) == (None, 1, ())

    def test_a_quantised_one_is_looked_at_all_the_same(self, tmp_path: Path) -> None:
        folder = families.save_tensors(
            tmp_path / "q", {"a.qweight": torch.zeros(2, dtype=torch.int32)}
        )
        found = inspect_checkpoint(folder)
        assert found.quantized == "is quantised (GPTQ or AWQ, according to its tensor a.qweight)"
        assert found.dtypes == {"I32": 2}

    def test_inputs_are_left_as_they_are(self, folders: dict[str, Path]) -> None:
        before = families.fingerprints(*folders.values())
        for folder in folders.values():
            inspect_checkpoint(folder)
        assert families.fingerprints(*folders.values()) == before

    def test_json_has_all_of_it(self, folders: dict[str, Path]) -> None:
        for folder in folders.values():
            found = inspect_checkpoint(folder)
            value = json.loads(json.dumps(found.as_json(), allow_nan=False))
            assert value["path"] == str(folder)
            assert value["tensors"] == sum(group["tensors"] for group in value["groups"])
            assert len(value["cells"]) == len(found.cells)

    def test_what_is_no_checkpoint_is_refused(
        self, folders: dict[str, Path], tmp_path: Path
    ) -> None:
        with pytest.raises(
            CheckpointError, match="no such folder, expected a checkpoint or a diff"
        ):
            inspect_checkpoint(tmp_path / "nothing")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
            inspect_checkpoint(tmp_path / "empty")
        broken = shutil.copytree(folders["base"], tmp_path / "broken")
        (broken / "model.safetensors").write_bytes(b"x")
        with pytest.raises(HeaderError):
            inspect_checkpoint(broken)


def test_parts_that_nobody_counted_leave_the_whole_unknown() -> None:
    counted, old = Measure(1, 10, 3.0, 4.0, 5), Measure(1, 10, 4.0, 3.0)
    assert total([counted, old]) == Measure(2, 20, 5.0, 5.0)
    assert total([counted, counted]).unchanged == 10
    assert total([]) == Measure(0, 0, 0.0, 0.0, 0)
    assert total([]).ratio == 0.0
    assert Measure(1, 1, 1.0, 0.0).ratio == float("inf")
