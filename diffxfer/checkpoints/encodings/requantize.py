"""Writing values in the encoding that another tensor has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.encodings import chosen_scales as scales
from diffxfer.checkpoints.encodings.chosen_scales import Recipe
from diffxfer.checkpoints.encodings.gpt_oss import TransposedCodes
from diffxfer.checkpoints.encodings.quantizer import Quantizer
from diffxfer.checkpoints.encodings.requantized import (
    ExactValues,
    NewCodes,
    NewPackedCodes,
    NewScales,
    NewShared,
    NewTransposedBlocks,
    NewValues,
    NewZeros,
    Transposed,
)
from diffxfer.checkpoints.encodings.scaled_codes import E2M1, INT4, PackedCodes, ScaledCodes
from diffxfer.checkpoints.encodings.scales import Grid

if TYPE_CHECKING:
    from diffxfer.checkpoints.stored import ShardFile, StoredTensor, TensorSpec

_EXPONENT_DTYPES = ("U8", "F8_E8M0")
_INT4_ERRORS = ((16, 0.075), (32, 0.095), (64, 0.1), (128, 0.111))
"""The largest width of a block, and the typical error of 4-bit integers in such blocks."""


@dataclass(frozen=True, slots=True)
class Requantized:
    """Values in an encoding.

    Attributes:
        written: the tensors to write, with the names, dtypes and shapes of the parts on disk.
        decoded: the values that they stand for.
        exact: the values that were quantised, in the order of `decoded`.
        original: those of the other tensor, in the same order.
    """

    written: tuple[StoredTensor, ...]
    decoded: StoredTensor
    exact: StoredTensor
    original: StoredTensor


def requantize(values: StoredTensor, like: StoredTensor) -> Requantized | None:
    """Quantise values anew, as another tensor is.

    Args:
        values: the values, in float32, with the shape of `like`.
        like: an encoded tensor.

    Returns:
        The tensors to write; None if that encoding cannot be written.
    """
    if type(like) is ScaledCodes:
        return _bytes(values, like)
    if type(like) is PackedCodes:
        return _nibbles(values, like)
    return _transposed(values, like) if type(like) is TransposedCodes else None


def typical_error(like: StoredTensor) -> float | None:
    """‖error‖ / ‖values‖ of values with a normal distribution in an encoding; None if not known.

    Measured on 1024 × 2048 values with the formats' own libraries.

    Args:
        like: an encoded tensor.
    """
    if type(like) is ScaledCodes:
        return 0.008 if like.codes.dtype == "I8" else 0.0265
    if type(like) is TransposedCodes:
        return 0.112
    if type(like) is not PackedCodes or like.high_first:
        return None
    if like.table != INT4:
        return 0.112 if like.grid.shared is None else 0.095
    width = like.grid.block[1]
    return next((error for most, error in _INT4_ERRORS if width <= most), 0.14)


def _transposed(values: StoredTensor, like: TransposedCodes) -> Requantized:
    experts, rows, groups, _ = like.blocks.shape
    shape = experts, rows, groups * 32
    turned = values.transposed() or Transposed(values.name, "F32", shape, values.shard, values)
    grid = Grid(like.scales, (rows, groups * 32), (1, 32))
    quantizer = Quantizer(turned, grid, Recipe(4, 0, 0, scales.rounded_up))
    blocks = NewTransposedBlocks(*_as(like.blocks), quantizer)
    written = blocks, NewScales(*_as(like.scales), quantizer)
    return Requantized(written, *_compared(quantizer, E2M1), like.transposed())


def _bytes(values: StoredTensor, like: ScaledCodes) -> Requantized | None:
    grid = like.grid
    quantizer = Quantizer(values, grid, _recipe_of_bytes(like))
    written: list[StoredTensor] = [NewCodes(*_as(like.codes), quantizer)]
    return _with_scales(quantizer, written, (), like)


def _recipe_of_bytes(like: ScaledCodes) -> Recipe:
    scale = like.grid.scale
    if like.codes.dtype == "I8":
        if like.grid.zero is not None:
            return Recipe(2, -128, 127, scales.asymmetric(scale.dtype, -128, 127))
        return Recipe(2, -128, 127, scales.symmetric(scale.dtype, 127.5))
    if scale.name.endswith("_scale_inv"):
        powers = like.powers_of_two or scale.dtype in _EXPONENT_DTYPES
        return Recipe(0, 0, 0, scales.powers_of_two(scale.dtype) if powers else scales.reciprocal)
    if scale.dtype in _EXPONENT_DTYPES:
        return Recipe(1, 0, 0, scales.exponents(8))
    return Recipe(1, 0, 0, scales.symmetric(scale.dtype, 448.0))


def _nibbles(values: StoredTensor, like: PackedCodes) -> Requantized | None:
    grid, offset = like.grid, 0
    if like.high_first:
        return None
    if like.table == INT4:
        offset = 8
        symmetric = scales.symmetric(grid.scale.dtype, 7.5)
        chosen = scales.asymmetric(grid.scale.dtype, -8, 7) if grid.zero else symmetric
        recipe = Recipe(2, -8, 7, chosen)
    elif grid.shared is not None:
        recipe = Recipe(3, 0, 0, scales.of_shared)
    else:
        recipe = Recipe(3, 0, 0, scales.exponents(2))
    quantizer = Quantizer(values, grid, recipe, shared=grid.shared is not None)
    written: list[StoredTensor] = [NewPackedCodes(*_as(like.codes), quantizer, offset)]
    return _with_scales(quantizer, [*written, *like.other], E2M1, like)


def _with_scales(
    quantizer: Quantizer,
    written: list[StoredTensor],
    table: tuple[float, ...],
    like: StoredTensor,
) -> Requantized:
    grid = quantizer.grid
    written.append(NewScales(*_as(grid.scale), quantizer))
    if grid.shared is not None:
        written.append(NewShared(*_as(grid.shared), quantizer))
    if grid.zero is not None:
        written.append(NewZeros(*_as(grid.zero), quantizer))
    return Requantized(tuple(written), *_compared(quantizer, table), like)


def _compared(quantizer: Quantizer, table: tuple[float, ...]) -> tuple[StoredTensor, StoredTensor]:
    """The values that codes stand for, and the values that were quantised."""
    values = quantizer.values
    made = values.name, "F32", values.shape, values.shard, quantizer
    return NewValues(*made, table), ExactValues(*made)


def _as(part: TensorSpec) -> tuple[str, str, tuple[int, ...], ShardFile]:
    return part.name, part.dtype, part.shape, part.shard
