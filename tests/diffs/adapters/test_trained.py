"""The trained adapters that ship with diffxfer, and what they score on base and on target."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from diffxfer import apply_diff
from diffxfer.family import family_folder

FAMILY = family_folder()
FILE = "adapter_model.safetensors"
# Another CPU sums float32 in another order, which can turn a letter that was nearly a tie.
TOLERANCE = 0.01


def example(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
        return import_module(name)


@pytest.fixture(scope="module")
def scoring() -> Any:
    return example("score_family")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "role", "right"),
    [
        ("adapter", "base", 0.998),
        ("adapter", "target", 0.752),
        ("small-adapter", "base", 0.652),
        ("small-adapter", "target", 0.048),
    ],
)
def test_it_scores_what_the_page_says(
    adapter: str, role: str, right: float, tmp_path: Path, scoring: Any
) -> None:
    apply_diff(FAMILY / adapter, FAMILY / role, tmp_path / "graft")
    assert scoring.accuracy(tmp_path / "graft") == pytest.approx(right, abs=TOLERANCE)


def test_the_small_one_is_small_and_names_its_base() -> None:
    folder = FAMILY / "small-adapter"
    assert {path.name for path in folder.iterdir()} == {FILE, "adapter_config.json"}
    assert (folder / FILE).stat().st_size < 20_000
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "base"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_smaller_one_is_trained_on_noisy_weights() -> None:
    script = example("train_adapter")
    model = script.smaller_adapter(FAMILY / "adapter", 1, r"layers\.0\.self_attn")
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    assert len(trained) == 4 * 2
    assert {tuple(before[name].shape) for name in trained} == {(1, 128), (128, 1)}
    assert all(before[name].any() for name in trained)
    batches = script.with_noise(model, iter("ab"), 0.1)
    assert next(batches) == "a"
    first = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    assert next(batches) == "b"
    for name, tensor in model.named_parameters():
        is_kept = name in trained or tensor.dim() == 1
        for now in (first[name], tensor):
            share = ((now - before[name]).std() / before[name].std()).item()
            assert is_kept or share == pytest.approx(0.1, rel=0.05), name
            assert not is_kept or now.equal(before[name]), name
        assert is_kept or not tensor.equal(first[name]), name
