"""Factors of low rank against the exact SVD."""

import numpy as np
import pytest

from diffxfer.diffs.lora.factorise import Ranks, factorise


def spectrum(rows, columns, power, seed=0):
    """A matrix with singular values 1 / i**power."""
    rng = np.random.default_rng(seed)
    size = min(rows, columns)
    left = np.linalg.qr(rng.standard_normal((rows, size)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, size)))[0]
    values = np.arange(1, size + 1) ** -float(power)
    return ((left * values) @ right.T).astype(np.float32)


def flat(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def best(matrix, rank):
    """The energy of the best approximation of a rank, by numpy."""
    return np.sum(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:rank] ** 2)


def energy_left(matrix, found):
    product = found.left.astype(np.float64) @ found.right.astype(np.float64)
    return np.sum((matrix - product) ** 2)


@pytest.mark.parametrize("rank", [1, 4, 32])
@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (400, 400), (60, 50)])
@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_nearly_all_of_the_best_energy_is_kept(shape, rank, power):
    matrix = spectrum(*shape, power) if power else flat(*shape)
    found = factorise(matrix, Ranks(rank), seed="x")
    assert (found.left.shape, found.right.shape) == ((shape[0], rank), (rank, shape[1]))
    assert found.energy >= 0.997 * best(matrix, rank)
    total = np.sum(np.square(matrix, dtype=np.float64))
    assert found.total == pytest.approx(total)
    # The energy that it states is that of the factors.
    assert energy_left(matrix, found) == pytest.approx(total - found.energy, abs=1e-6 * total)


@pytest.mark.parametrize("shape", [(500, 300), (300, 500)])
def test_exact_is_exact(shape):
    matrix = flat(*shape)
    found = factorise(matrix, Ranks(20), seed="x", exact=True)
    assert found.energy == pytest.approx(best(matrix, 20), rel=1e-12)


def test_a_matrix_of_low_rank_is_given_back():
    rng = np.random.default_rng(1)
    matrix = (rng.standard_normal((600, 8)) @ rng.standard_normal((8, 400))).astype(np.float32)
    found = factorise(matrix, Ranks(32), seed="x")
    assert found.rank == 8, "no factors of noise"
    assert energy_left(matrix, found) <= 1e-11 * found.total


def test_weak_directions_beside_a_strong_one_are_found():
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for n in (500, 400))
    values = 10.0 ** -np.arange(6)
    matrix = ((left * values) @ right.T).astype(np.float32)
    found = factorise(matrix, Ranks(6), seed="x")
    assert energy_left(matrix, found) <= 1e-12


def test_the_seed_alone_decides_the_start():
    matrix = flat(500, 300)
    one, same, other = (factorise(matrix, Ranks(4), seed=seed) for seed in "xxy")
    assert np.array_equal(one.left, same.left)
    assert np.array_equal(one.right, same.right)
    assert not np.array_equal(one.left, other.left)


@pytest.mark.parametrize("shape", [(700, 300), (300, 700)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_chooses_the_smallest_rank(shape, energy):
    matrix = spectrum(*shape, 1)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    needed = int(np.searchsorted(np.cumsum(values) / values.sum(), energy)) + 1
    found = factorise(matrix, Ranks(128, energy), seed="x")
    assert needed <= found.rank <= needed + 1
    assert found.kept >= energy


def test_the_largest_rank_bounds_what_energy_wants():
    found = factorise(flat(400, 300), Ranks(10, 0.95), seed="x")
    assert found.rank == 10
    assert found.kept < 0.95


def test_a_zero_matrix_has_no_factors():
    found = factorise(np.zeros((30, 20), np.float32), Ranks(4), seed="x")
    assert (found.rank, found.kept, found.left.shape, found.right.shape) == (0, 1, (30, 0), (0, 20))


@pytest.mark.parametrize("shape", [(600, 400), (60, 50)])
@pytest.mark.parametrize("size", [1e-30, 1e19, 1e36])
@pytest.mark.parametrize("exact", [False, True])
def test_very_large_and_very_small_matrices(shape, size, exact):
    matrix = spectrum(*shape, 0.5)
    usual = factorise(matrix, Ranks(8), seed="x", exact=exact)
    found = factorise((matrix * size).astype(np.float32), Ranks(8), seed="x", exact=exact)
    assert np.isfinite(found.left).all()
    assert np.isfinite(found.right).all()
    assert found.kept == pytest.approx(usual.kept, abs=1e-6)
    product = found.left.astype(np.float64) @ found.right.astype(np.float64) / size
    lost = np.sum((matrix - product) ** 2)
    assert 1 - lost / usual.total == pytest.approx(found.kept, abs=1e-6)


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "")])
@pytest.mark.parametrize("shape", [(300, 250), (250, 300), (40, 50)])
def test_the_energy_is_that_of_the_factors_as_stored(shape, dtype, name):
    import torch

    rng = np.random.default_rng(3)
    matrix = (rng.standard_normal((shape[0], 4)) @ rng.standard_normal((4, shape[1]))) * 1e-3
    matrix = matrix.astype(np.float32)
    found = factorise(matrix, Ranks(4), seed="x", dtype=dtype)
    halves = [torch.from_numpy(np.array(each)) for each in (found.left, found.right)]
    if name:
        halves = [each.to(getattr(torch, name)) for each in halves]
    product = (halves[0].double() @ halves[1].double()).numpy()
    lost = np.sum((matrix - product) ** 2) / found.total
    assert 1 - found.kept == pytest.approx(lost, rel=1e-3, abs=1e-15)
    expected = {"BF16": (1e-6, 1e-4), "F16": (1e-8, 1e-6), "F32": (0, 1e-12)}[dtype]
    assert expected[0] <= 1 - found.kept <= expected[1]
