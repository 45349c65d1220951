"""Points of a straight path between two models, against the formula."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from diffxfer.errors import DiffxferError, MatchError, OptionError
from diffxfer.models import path as path_module
from diffxfer.models.checkpoint import checkpoint_source
from diffxfer.models.loading import load, refill
from diffxfer.models.path import path_source
from tests import families
from tests.helpers import same_bits, values

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def save(folder: Path, **tensors: torch.Tensor) -> Path:
    return families.save_tensors(folder, {n.replace("__", "."): t for n, t in tensors.items()})


def rounded(exact: np.ndarray[Any, np.dtype[np.float64]], dtype: str) -> torch.Tensor:
    """Round float64 to a dtype by numpy; to bfloat16 by way of float32, as PyTorch casts."""
    if dtype == "BF16":
        bits = exact.astype(np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return torch.from_numpy(bits.astype(np.uint16)).view(torch.bfloat16)
    kinds: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return torch.from_numpy(exact.astype(kinds[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0.1, 0.5, 1 / 3])
def test_a_point_is_the_formula_rounded_once(
    tmp_path: Path, dtype: str, t: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_module, "_STEP", 7)  # several steps, the last one shorter
    ends = [values(dtype, (5, 6), seed) for seed in (1, 2)]
    sources = [
        checkpoint_source(save(tmp_path / name, w=end))
        for name, end in zip("ab", ends, strict=True)
    ]
    exact = [end.double().numpy() for end in ends]
    expected = rounded((1 - t) * exact[0] + t * exact[1], dtype)
    assert same_bits(path_source(*sources, t).tensor("w"), expected)


def test_the_ends_have_the_bits_of_the_models(tmp_path: Path) -> None:
    special = torch.tensor([-0.0, 1e-40, float("nan"), float("inf"), 1.0])
    other = torch.tensor([0.0, -0.0, 1.0, -float("inf"), 3.0]).bfloat16()
    a = checkpoint_source(save(tmp_path / "a", w=special, scalar=torch.tensor(1.0)))
    b = checkpoint_source(save(tmp_path / "b", w=other, scalar=torch.tensor(2.0)))
    for t, end in ((0, a), (1, b)):
        point = path_source(a, b, t)
        assert list(point.names()) == list(a.names())
        assert point.dtype("w") == end.dtype("w")
        for name in a.names():
            assert same_bits(point.tensor(name), end.tensor(name))
            assert point.shape(name) == end.shape(name)
    assert point.folder == a.folder


def test_the_dtype_between_the_ends_is_that_of_the_first(tmp_path: Path) -> None:
    ends = values("BF16", (9,), 1), values("F32", (9,), 2)
    a, b = (
        checkpoint_source(save(tmp_path / name, w=end))
        for name, end in zip("ab", ends, strict=True)
    )
    exact = 0.75 * ends[0].double().numpy() + 0.25 * ends[1].double().numpy()
    assert same_bits(path_source(a, b, 0.25).tensor("w"), rounded(exact, "BF16"))


def test_integers_must_be_equal_and_are_kept(tmp_path: Path) -> None:
    w, ids = torch.ones(2), torch.arange(3)
    a = checkpoint_source(save(tmp_path / "a", w=w, ids=ids, mask=torch.tensor([True])))
    same = checkpoint_source(save(tmp_path / "b", w=w, ids=ids, mask=torch.tensor([True])))
    point = path_source(a, same, 0.5)
    assert same_bits(point.tensor("ids"), ids)
    assert same_bits(point.tensor("mask"), torch.tensor([True]))
    other = checkpoint_source(save(tmp_path / "c", w=w, ids=ids + 1, mask=torch.tensor([True])))
    for t in (0, 0.5, 1):
        with pytest.raises(MatchError, match=r"ids has different I64 values"):
            path_source(a, other, t).tensor("ids")


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"w": torch.ones(3)}, r"w is \(2,\) in .*a and \(3,\) in .*b"),
        ({"w": torch.ones(2), "v": torch.ones(1)}, r"b has tensors that .*a lacks: v"),
        ({"v": torch.ones(1)}, r"a has tensors that .*b lacks: w"),
        ({"w": torch.ones(2, dtype=torch.int64)}, r"w is F32 in .*a and I64 in .*b"),
    ],
)
def test_models_of_other_tensors_are_refused(
    tmp_path: Path, other: dict[str, torch.Tensor], problem: str
) -> None:
    a = checkpoint_source(save(tmp_path / "a", w=torch.ones(2)))
    b = checkpoint_source(save(tmp_path / "b", **other))
    with pytest.raises(MatchError, match=problem) as caught:
        path_source(a, b, 0.5)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan"), float("inf")])
def test_t_is_from_0_to_1(tmp_path: Path, t: float) -> None:
    a = checkpoint_source(save(tmp_path / "a", w=torch.ones(2)))
    with pytest.raises(OptionError, match="from 0 to 1"):
        path_source(a, a, t)


@pytest.mark.parametrize("config", [families.llama(), families.llama(tie_word_embeddings=True)])
def test_a_model_walks_along_a_path(tmp_path: Path, config: Any) -> None:
    folders = [families.save_model(tmp_path / str(seed), config, seed) for seed in (1, 2)]
    a, b = map(checkpoint_source, folders)
    loaded = load(path_source(a, b, 0))
    assert loaded.tokenizer is None
    for t in (0.5, 1, 0.25, 0):
        refill(loaded, path_source(a, b, t))
        ends = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
        for name, found in loaded.model.state_dict().items():
            exact = [end[name].double() for end in ends]
            expected = ((1 - t) * exact[0] + t * exact[1]).bfloat16()
            assert same_bits(found, expected), (t, name)


def test_a_refill_with_another_model_is_refused(tmp_path: Path) -> None:
    loaded = load(checkpoint_source(families.save_model(tmp_path / "a", families.llama(), 1)))
    other = families.llama(num_hidden_layers=1)
    with pytest.raises(DiffxferError, match="lacks tensors that transformers expects"):
        refill(loaded, checkpoint_source(families.save_model(tmp_path / "b", other, 1)))
