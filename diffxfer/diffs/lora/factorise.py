"""The best approximation of a matrix by two factors of low rank: its truncated SVD.

The singular vectors come from a block Krylov space (Musco & Musco 2015, arXiv 1504.05477), which
needs far fewer products with the matrix than power iterations if the singular values fall slowly,
as those of a full fine-tune do. It grows until the energy of the approximation has settled. Small
matrices, and all with `exact`, take the eigenvectors of the Gram matrix in float64.

The energy of a matrix is the sum of its squared elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    import torch

    Matrix = npt.NDArray[np.float32]

_MORE = 8
"""Vectors of a block beyond the rank."""
_WIDEST = 64
"""The largest rank that decides a block's width; for larger ranks the space has more blocks."""
_SETTLED = 1e-3
"""The energy that more steps are expected to add, as a share, at which the space is complete."""
_STEPS = 40
_USUAL = 40
"""Matrices whose largest element is between 2**-40 and 2**40 need no scaling."""
_SMALL = 192
"""Up to this smaller dimension, the Gram matrix takes less time than a Krylov space."""
_WEAK = 1e-5
"""The share of the largest eigenvalue of the Gram matrix that float32 can tell from its errors."""
_ROWS = 4096
"""Rows that are widened to float64 at once."""
_NOTHING = 1e-7
"""Singular values below this share of the largest are rounding errors of float32."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """How a rank is chosen.

    Attributes:
        most: the largest rank.
        energy: the share of the energy to keep, by the smallest rank that keeps it; None to use
            the largest rank.
    """

    most: int
    energy: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Factorisation:
    """A matrix approximated by a product L·R.

    Attributes:
        left: L, of shape ``(rows, rank)``.
        right: R, of shape ``(rank, columns)``; both have the square roots of the singular values.
        energy: the energy of the approximation, with the factors as they are stored.
        total: the energy of the matrix.
    """

    left: Matrix
    right: Matrix
    energy: float
    total: float

    @property
    def rank(self) -> int:
        """The rank; 0 if the matrix is zero."""
        return int(self.left.shape[1])

    @property
    def kept(self) -> float:
        """The share of the energy that is kept, 1 if the matrix is zero."""
        return min(self.energy / self.total, 1.0) if self.total else 1.0


def factorise(
    matrix: Matrix,
    ranks: Ranks,
    *,
    seed: str,
    exact: bool = False,
    device: str = "cpu",
    dtype: str = "F32",
) -> Factorisation:
    """Approximate a matrix by two factors.

    Args:
        matrix: finite values, of shape ``(rows, columns)``.
        ranks: how the rank is chosen.
        seed: decides the random start, so that the same matrix gives the same factors.
        exact: compute the singular vectors to the last digits, in float64.
        device: where torch computes: ``"cpu"`` or a GPU.
        dtype: the dtype in which the factors will be stored, as safetensors names it; it decides
            the energy that they keep.

    Returns:
        The factors, in float32, and their energy.
    """
    import torch

    given, scale = _scaled(torch.from_numpy(matrix).to(device))
    wide = given.shape[0] < given.shape[1]
    tall = given.T if wide else given
    total = _energy(tall)
    if not total:
        rows, columns = (np.zeros(size, np.float32) for size in matrix.shape)
        return Factorisation(rows[:, None][:, :0], columns[None][:0], 0.0, 0.0)
    most = min(ranks.most, tall.shape[1])
    wanted = None if ranks.energy is None else ranks.energy * total
    basis = None
    if not exact and tall.shape[1] > _SMALL:
        basis = _krylov(tall, most, wanted, _start(tall, most, seed))
    if basis is None:
        basis = _gram(tall, most)
    u, values, v = _within(tall, basis, exact=exact)
    rank = _rank(values, most, wanted)
    root = (values[:rank] * scale).sqrt()
    left, right = u[:, :rank] * root, v[:, :rank] * root
    lost = _lost(tall, left, right, scale, dtype)
    if wide:
        left, right = right, left
    return Factorisation(
        _plain(left), _plain(right.T), max(total - lost, 0.0) * scale**2, total * scale**2
    )


def _scaled(given: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A matrix whose products are finite in float32, and its scale: a power of 2."""
    import torch

    largest = float(torch.linalg.vector_norm(given, torch.inf)) if given.numel() else 0.0
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= _USUAL:
        return given, 1.0
    # In two steps, since one factor alone could be beyond float32.
    half = exponent // 2
    return given * 2.0**-half * 2.0 ** (half - exponent), 2.0**exponent


def _lost(
    tall: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, dtype: str
) -> float:
    """The energy of what the factors lack of a matrix, if they are stored in a dtype."""
    from diffxfer.streaming.torch_ops import TORCH_DTYPES

    stored = TORCH_DTYPES[dtype]
    ours, theirs = (each.float().to(stored).double() / math.sqrt(scale) for each in (left, right))
    lost, start = 0.0, 0
    for rows in _widened(tall):
        lost += float((rows - ours[start : start + len(rows)] @ theirs.T).square().sum())
        start += len(rows)
    return lost if math.isfinite(lost) else math.inf


def _plain(values: torch.Tensor) -> Matrix:
    import torch

    found: Matrix = values.to(torch.float32).cpu().contiguous().numpy()
    return found


def _widened(tall: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of a matrix in float64, some at a time."""
    for start in range(0, tall.shape[0], _ROWS):
        yield tall[start : start + _ROWS].double()


def _energy(tall: torch.Tensor) -> float:
    return sum(float(rows.square().sum()) for rows in _widened(tall))


def _start(tall: torch.Tensor, most: int, seed: str) -> torch.Tensor:
    """The first block: random vectors that depend on the seed alone."""
    import torch

    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(seed.encode()) >> 1)
    width = min(most, _WIDEST) + _MORE
    return torch.randn(tall.shape[1], width, generator=generator).to(tall.device)


def _gram(tall: torch.Tensor, most: int) -> torch.Tensor:
    """The first right singular vectors, in float64, of shape ``(columns, most)``."""
    import torch

    size = tall.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=tall.device)
    for rows in _widened(tall):
        gram.addmm_(rows.T, rows)
    vectors: torch.Tensor = torch.linalg.eigh(gram)[1].flip(1)[:, :most]
    return vectors


def _krylov(
    tall: torch.Tensor, most: int, wanted: float | None, block: torch.Tensor
) -> torch.Tensor | None:
    """Approximate right singular vectors from a Krylov space.

    Args:
        tall: the matrix, with fewer columns than rows.
        most: the largest rank.
        wanted: the energy that is enough, None to use the largest rank.
        block: the first block.

    Returns:
        Orthonormal vectors, a few more than the rank; None if the space would be so large that
        the Gram matrix takes less time.
    """
    import torch

    space: torch.Tensor = torch.linalg.qr(block)[0]
    block, gram = space, torch.zeros(0, 0, dtype=torch.float64, device=tall.device)
    found: list[float] = []
    for _ in range(_STEPS):
        if 2 * space.shape[1] > tall.shape[1]:
            return None
        product = tall.T @ (tall @ block)
        gram = _bordered(gram, (space.T @ product).double())
        values = torch.linalg.eigvalsh(gram).flip(0).cumsum(0)
        enough = int((values < wanted).sum()) + 1 if wanted is not None else most
        found.append(float(values[min(enough, most, len(values)) - 1]))
        if len(values) >= min(enough, most) and _has_settled(found):
            break
        block = product
        for _ in range(2):  # what is left of a block may be rounding errors, inside the space
            block = torch.linalg.qr(block - space @ (space.T @ block))[0]
        space = torch.cat((space, block), 1)
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(gram))
    weakest = values[min(most, len(values)) - 1]
    # Products in float32 say nothing of directions this weak: all of them are tried.
    kept = len(values) if weakest < _WEAK * values[0] else most + _MORE
    basis: torch.Tensor = space[:, : len(values)] @ vectors[:, :kept].to(space.dtype)
    return basis


def _bordered(gram: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix with more columns, whose last rows are square."""
    import torch

    old, width = gram.shape[0], columns.shape[1]
    made = torch.empty(old + width, old + width, dtype=gram.dtype, device=gram.device)
    made[:old, :old] = gram
    made[:, old:], made[old:, :old] = columns, columns[:old].T
    made[old:, old:] = (columns[old:] + columns[old:].T) / 2
    return made


def _has_settled(found: list[float]) -> bool:
    """Whether more steps would add little, if gains go on to fall as they did."""
    if len(found) < 2:
        return False
    last, before = found[-1] - found[-2], found[-2] - (found[-3] if len(found) > 2 else 0.0)
    ratio = min(max(last / before, 0.3), 0.9) if before > 0 else 0.9
    return last * ratio / (1 - ratio) <= _SETTLED * found[-1]


def _within(
    tall: torch.Tensor, basis: torch.Tensor, *, exact: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The SVD of a matrix restricted to a space: U, singular values, V."""
    import torch

    if exact:
        image = torch.cat([rows @ basis for rows in _widened(tall)])
    else:
        basis = torch.linalg.qr(basis.to(tall.dtype))[0]
        image = tall @ basis
    q, triangle = torch.linalg.qr(image)
    u, values, v = torch.linalg.svd(triangle.double())
    return q @ u.to(q.dtype), values, basis @ v.T.to(basis.dtype)


def _rank(values: torch.Tensor, most: int, wanted: float | None) -> int:
    """The rank by the singular values."""
    import torch

    present = int((values > _NOTHING * values[0]).sum())
    if wanted is not None:
        energies = torch.cumsum(values.square(), 0)
        present = min(present, int((energies < wanted * (1 - 1e-9)).sum()) + 1)
    return min(most, present)
