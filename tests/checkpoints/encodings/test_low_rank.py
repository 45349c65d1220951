"""Δ of an adapter, read in any pieces, against sums in numpy that are written independently."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffxfer.checkpoints.encodings import adapted, low_rank
from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.checkpoints.stored import BITS
from tests.helpers import DTYPES, save_shard, values

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from diffxfer.checkpoints.encodings.low_rank import LowRank
    from diffxfer.checkpoints.stored import StoredTensor

Matrix = np.ndarray[Any, np.dtype[np.float64]]
HALF = torch.bfloat16
COMMON = [("BF16", "BF16"), ("F32", "F32"), ("F16", "F16"), ("F64", "F32")]
MIXES = [
    pytest.param(mix, marks=() if mix in COMMON else (pytest.mark.slow,), id="-".join(mix))
    for mix in product(DTYPES, repeat=2)  # each is compiled
]


def product_in_order(left: Matrix, right: Matrix, scaling: float) -> Matrix:
    """scaling·L·R, one term after the other; each product and each sum is rounded."""
    total = left[:, :1] * right[:1]
    for k in range(1, left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    return total * scaling


def exactly(tensor: Tensor) -> Matrix:
    return tensor.double().numpy()


def read(stored: StoredTensor, cuts: Sequence[int] = (), files: Any = None) -> Any:
    """All elements, read in pieces that end at `cuts`."""
    size = BITS[stored.dtype] // 8
    memory = memoryview(bytearray(stored.nbytes))
    files = files or one_at_a_time()
    for start, stop in zip((0, *cuts), (*cuts, stored.elements), strict=True):
        if start < stop:
            stored.read(files, start, memory[start * size : stop * size])
    kind = {"F64": "<f8", "F32": "<f4", "BF16": "<u2"}[stored.dtype]
    return np.frombuffer(memory, kind).reshape(stored.shape)


def bits(array: Matrix) -> Any:
    return np.ascontiguousarray(array, np.float64).view(np.uint64)


def same(left: Matrix, right: Matrix) -> bool:
    return left.shape == right.shape and bool((bits(left) == bits(right)).all())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("factors")


def linear(folder: Path, rows: int, columns: int, rank: int, mix: tuple[str, str], seed: int):
    a, b = values(mix[0], (rank, columns), seed), values(mix[1], (rows, rank), seed + 1)
    specs = save_shard(folder / "linear.safetensors", {"a": a, "b": b})
    delta = low_rank.linear("w", (rows, columns), specs["a"], specs["b"], 1.7)
    return delta, product_in_order(exactly(b), exactly(a), 1.7)


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_of_dtypes(folder: Path, mix: tuple[str, str]) -> None:
    delta, expected = linear(folder, 37, 300, 7, mix, 0)
    assert same(read(delta), expected)


@given(data=st.data())
def test_any_shape_rank_and_pieces(folder: Path, data: st.DataObject) -> None:
    rows, rank = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 14))
    columns = data.draw(st.one_of(st.integers(1, 9), st.sampled_from([255, 256, 257, 600])))
    kinds = st.sampled_from(["BF16", "F32"])
    delta, expected = linear(
        folder,
        rows,
        columns,
        rank,
        (data.draw(kinds), data.draw(kinds)),
        data.draw(st.integers(0, 99)),
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, rows * columns), max_size=5)))
    assert same(read(delta, cuts), expected)


@given(data=st.data())
def test_an_embedding_and_a_transposed_layer(folder: Path, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    rank = data.draw(st.integers(1, 9))
    a, b = values("BF16", (rank, rows), 1), values("F32", (columns, rank), 2)
    specs = save_shard(folder / "embedding.safetensors", {"a": a, "b": b})
    delta = low_rank.transposed("w", (rows, columns), specs["a"], specs["b"], 0.5)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows * columns), max_size=5)))
    assert same(read(delta, cuts), product_in_order(exactly(a).T, exactly(b).T, 0.5))


@given(data=st.data())
def test_fused_experts(folder: Path, data: st.DataObject) -> None:
    experts, rank = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    inputs, outputs = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    is_transposed = data.draw(st.booleans())
    a = values("F32", (experts * rank, inputs), 3)
    b = values("BF16", (outputs, rank * experts), 4)
    specs = save_shard(folder / "experts.safetensors", {"a": a, "b": b})
    size = (inputs, outputs) if is_transposed else (outputs, inputs)
    delta = low_rank.experts(
        "w", (experts, *size), specs["a"], specs["b"], 3.0, is_transposed=is_transposed
    )
    # As in PEFT: A is (experts, rank, in), and B is (out, rank, experts).
    of_a, of_b = exactly(a).reshape(experts, rank, inputs), exactly(b)
    of_b = of_b.reshape(outputs, rank, experts)
    expected = [
        product_in_order(of_a[e].T, of_b[:, :, e].T, 3.0)
        if is_transposed
        else product_in_order(of_b[:, :, e], of_a[e], 3.0)
        for e in range(experts)
    ]
    cuts = sorted(data.draw(st.lists(st.integers(0, delta.elements), max_size=6)))
    assert same(read(delta, cuts), np.stack(expected))


def test_a_convolution(folder: Path) -> None:
    a, b = values("F32", (3, 5, 2, 2), 5), values("F32", (4, 3, 1, 1), 6)
    specs = save_shard(folder / "conv.safetensors", {"a": a, "b": b})
    delta = low_rank.linear("w", (4, 5, 2, 2), specs["a"], specs["b"], 2.0)
    flat = product_in_order(exactly(b).reshape(4, 3), exactly(a).reshape(3, 20), 2.0)
    assert same(read(delta, (1, 33)), flat.reshape(4, 5, 2, 2))


def test_one_thread_may_read_tensors_of_different_sizes_in_turn(folder: Path) -> None:
    """Memory that is reused must not hold factors of another tensor."""
    first, expected = linear(folder / "1", 5, 700, 12, ("BF16", "BF16"), 1)
    second, other = linear(folder / "2", 90, 20, 2, ("F32", "F32"), 2)
    files = one_at_a_time()
    for _ in range(2):
        assert same(read(first, (100, 2000), files), expected)
        assert same(read(second, (7,), files), other)


def made_of(folder: Path, rows: int, columns: int, by_column: bool = False):
    """W, m and Δ of rank 3."""
    rank = 3
    w, a, b = (
        values("BF16", shape, seed)
        for seed, shape in enumerate(((rows, columns), (rank, columns), (rows, rank)))
    )
    m = torch.linspace(5e4, 2e5, columns if by_column else rows)
    if by_column:
        a, b = b.T.contiguous(), a.T.contiguous()
    specs = save_shard(folder / "made.safetensors", {"w": w, "a": a, "b": b, "m": m})
    make = low_rank.transposed if by_column else low_rank.linear
    return w, m, specs, make("w", (rows, columns), specs["a"], specs["b"], 0.75)


def test_base_plus_delta_is_rounded_once(folder: Path) -> None:
    w, _, specs, delta = made_of(folder, 500, 1100)
    whole = adapted.Adapted("w", "BF16", w.shape, specs["w"].shard, specs["w"], delta)
    expected = (w.double() + torch.from_numpy(read(delta).copy())).to(HALF)
    for cuts in ((), (1, 77_777, 300_000)):
        assert np.array_equal(read(whole, cuts), expected.view(torch.uint16).numpy())
    assert whole.minus(specs["w"]) is delta
    assert whole.minus(specs["a"]) is None


@pytest.mark.parametrize("by_column", [False, True])
def test_dora_in_pieces(folder: Path, by_column: bool) -> None:
    """Several pieces of the largest size: what one computes first must not spoil another."""
    w, m, specs, delta = made_of(folder, 700, 900, by_column)
    stored = adapted.Dora(
        "w", "F64", w.shape, specs["w"].shard, specs["w"], delta, specs["m"], by_column
    )
    whole = exactly(w) + read(delta)
    norms = np.sqrt((whole * whole).sum(axis=0 if by_column else 1))
    factor = exactly(m) / norms
    new = whole * (factor if by_column else factor[:, None])
    expected = new - exactly(w)
    once = read(stored)
    assert np.allclose(once, expected, rtol=1e-12, atol=1e-13 * np.abs(whole).max())
    for cuts in ((1, 899, 901), (450_000, 500_000), tuple(range(0, 630_000, 70_001))):
        assert same(read(stored, cuts), once)
    late = one_at_a_time()  # a thread whose first piece is not the first of the tensor
    memory = memoryview(bytearray(8 * 1000))
    stored.read(late, 400_000, memory)
    assert same(np.frombuffer(memory, "<f8"), once.reshape(-1)[400_000:401_000])


@given(data=st.data())
def test_replaced_rows(folder: Path, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    ids = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(0, rows))]
    w, new = values("BF16", (rows, columns), 1), values("F32", (max(len(ids), 1), columns), 2)
    specs = save_shard(folder / "rows.safetensors", {"w": w, "new": new})
    order = sorted(range(len(ids)), key=ids.__getitem__)
    stored = adapted.ReplacedRows(
        *("w", "F32", w.shape, specs["w"].shard, specs["w"], specs["new"]),
        *(tuple(ids[i] for i in order), tuple(order)),
    )
    expected = w.float()
    for place, token in enumerate(ids):
        expected[token] = new[place]
    cuts = sorted(data.draw(st.lists(st.integers(0, rows * columns), max_size=4)))
    assert np.array_equal(read(stored, cuts).view("<u4"), expected.numpy().view("<u4"))


def test_what_a_value_depends_on_is_in_the_fingerprint(folder: Path) -> None:
    """A run that continues compares `parts` and `parameters`."""
    _, _, specs, delta = made_of(folder, 4, 4)
    a, b = specs["a"], specs["b"]
    others: list[LowRank] = [
        low_rank.linear("w", (4, 4), a, b, 0.5),
        low_rank.transposed("w", (4, 4), a, b, 0.75),
    ]
    assert len({repr(each.parameters) for each in (delta, *others)}) == 3
    assert delta.parts == (b, a)
