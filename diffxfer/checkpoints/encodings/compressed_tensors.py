"""The formats of compressed-tensors: float8, int8, packed int4, NVFP4, mxfp4 and mxfp8.

Which one a weight has is shown by its parts; the config's ``config_groups`` state block sizes. See
https://github.com/vllm-project/compressed-tensors, `compressors`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.encodings.encoding import Encoding
from diffxfer.checkpoints.encodings.quantization_config import (
    pair_of,
    read_quantization,
    shortened,
)
from diffxfer.checkpoints.encodings.scaled_codes import (
    E2M1,
    INT4,
    PackedCodes,
    ScaledCodes,
    stored_shape,
)
from diffxfer.checkpoints.encodings.scales import grid_of
from diffxfer.checkpoints.files import one_at_a_time
from diffxfer.errors import CheckpointError, QuantizedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffxfer.checkpoints.encodings.scales import Grid
    from diffxfer.checkpoints.stored import Files, StoredTensor, TensorSpec

    Tensors = Mapping[str, TensorSpec]

FORMAT = "compressed-tensors"
METHODS = ("compressed-tensors",)
FORMATS = (
    "dense",
    "float-quantized",
    "naive-quantized",
    "int-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
"""The values of ``format`` that are read."""
_AGAIN = "download or save it again"
_REMEDY = "use the checkpoint in its full precision; quantise the graft afterwards"
_CODES = ("F8_E4M3", "I8")
_PARTS = ("_scale", "_shape", "_zero_point", "_global_scale", "_g_idx")


def find(config: Mapping[str, Any], tensors: Tensors) -> Iterator[StoredTensor]:
    """Find the weights that compressed-tensors has stored.

    Raises:
        CheckpointError: if a weight lacks a part, or a part has a wrong shape or dtype.
        QuantizedError: if a format is not known.
    """
    stated = read_quantization(config)
    if stated.method != "compressed-tensors":
        return
    groups = _groups(stated.values)
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    formats = [stated.values.get("format"), *(group.get("format") for group in groups)]
    used: set[str] = set()
    files = one_at_a_time()
    for name, spec in tensors.items():
        _refuse_unknown(formats, spec)
        if name.endswith(".weight_packed"):
            found: PackedCodes | ScaledCodes
            found = _packed(name.removesuffix("_packed"), spec, tensors, weights, files)
        elif spec.dtype in _CODES and name + "_scale" in tensors:
            found = _plain(spec, tensors, weights)
        else:
            continue
        _refuse_disagreement(formats, found)
        used.update(part.name for part in found.parts)
        yield found
    for name, spec in tensors.items():
        weight, is_part, _ = name.rpartition(".weight_")
        if is_part and name.endswith(_PARTS) and name not in used:
            problem = f"{name} belongs to no weight: {weight}.weight is missing or not quantised"
            raise CheckpointError(spec.shard.path, problem, _AGAIN)


def _groups(stated: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = stated.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    return [group for group in found if isinstance(group, dict)]


def _refuse_unknown(formats: list[Any], spec: TensorSpec) -> None:
    for named in formats:
        if named is not None and named not in FORMATS:
            problem = f"has the compressed-tensors format {shortened(named)}"
            problem = f"{problem}, expected {', '.join(FORMATS)}"
            raise QuantizedError(spec.shard.path.parent, problem, _REMEDY)


def _refuse_disagreement(formats: list[Any], found: PackedCodes | ScaledCodes) -> None:
    """Refuse a weight that is stored in another format than the config states."""
    named = {each for each in formats if each in FORMATS} - {"mixed-precision", "dense"}
    shown = _formats_of(found)
    if named and not named & shown:
        codes = found.parts[0]
        problem = f"{codes.name} is {codes.dtype}, as in {' or '.join(sorted(shown))}"
        problem = f"{problem}, but config.json says {' and '.join(sorted(named))}"
        raise CheckpointError(codes.shard.path, problem, _AGAIN)


def _formats_of(found: PackedCodes | ScaledCodes) -> set[str]:
    """The formats that a weight may have, by the dtypes of its parts."""
    codes, scale = found.parts[0].dtype, found.grid.scale.dtype
    if isinstance(found, PackedCodes):
        if codes == "I32":
            return {"pack-quantized"}
        return {"nvfp4-pack-quantized" if scale == "F8_E4M3" else "mxfp4-pack-quantized"}
    if codes == "I8":
        return {"int-quantized", "naive-quantized"}
    if scale in ("U8", "F8_E8M0"):
        return {"mxfp8-quantized"}
    return {"float-quantized", "naive-quantized"}


def _plain(codes: TensorSpec, tensors: Tensors, weights: list[Any]) -> ScaledCodes:
    """A weight whose codes take a byte each."""
    scale = tensors[codes.name + "_scale"]
    bits = [args for args in weights if args.get("num_bits", 8) == 8]
    block = (1, 32) if scale.dtype in ("U8", "F8_E8M0") else _block(bits, codes.shape, scale)
    grid = grid_of(codes, codes.shape, scale, block)
    zero = tensors.get(codes.name + "_zero_point")
    if zero is not None:
        if codes.dtype != "I8":
            problem = f"{zero.name} has zero points for {codes.dtype}, expected none"
            raise QuantizedError(zero.shard.path, problem, _REMEDY)
        _expect(zero, ("I8",), scale.shape)
        grid = replace(grid, zero=zero)
    return ScaledCodes(codes.name, "F32", codes.shape, codes.shard, codes, grid)


def _packed(
    name: str, codes: TensorSpec, tensors: Tensors, weights: list[Any], files: Files
) -> PackedCodes:
    """A weight whose codes take 4 bits each."""
    scale = tensors.get(name + "_scale")
    if scale is None:
        problem = f"{codes.name} has no scales: {name}_scale is missing"
        raise CheckpointError(codes.shard.path, problem, _AGAIN)
    if len(codes.shape) < 2 or codes.dtype not in ("I32", "U8"):
        problem = f"{codes.name} is {codes.dtype} {codes.shape}, expected I32 or U8 matrices"
        raise CheckpointError(codes.shard.path, problem, _AGAIN)
    if codes.dtype == "U8":
        return _packed_floats(name, codes, scale, tensors)
    return _packed_integers(name, codes, scale, tensors, weights, files)


def _packed_floats(
    name: str, codes: TensorSpec, scale: TensorSpec, tensors: Tensors
) -> PackedCodes:
    """NVFP4 or mxfp4: floats of 4 bits, two to a byte."""
    shape = *codes.shape[:-1], codes.shape[-1] * 2
    shared = tensors.get(name + "_global_scale")
    size = 16 if scale.dtype == "F8_E4M3" else 32
    if size == 16 and (shared is None or shared.elements != 1):
        found = "is missing" if shared is None else f"has {shared.elements} elements, expected one"
        raise CheckpointError(codes.shard.path, f"{name}_global_scale {found}", _AGAIN)
    if shared is not None:
        _expect(shared, ("F32",), shared.shape)
    grid = replace(grid_of(codes, shape, scale, (1, size)), shared=shared)
    _refuse_other_block(grid, (1, size), scale, codes)
    return PackedCodes(name, "F32", shape, codes.shard, codes, grid, E2M1, shape[-1])


def _packed_integers(
    name: str,
    codes: TensorSpec,
    scale: TensorSpec,
    tensors: Tensors,
    weights: list[Any],
    files: Files,
) -> PackedCodes:
    """Integers of 4 bits, eight to an int32."""
    widths = [args.get("num_bits") for args in weights if args.get("type", "int") == "int"]
    if widths and 4 not in widths:
        problem = f"has packed integers of {', '.join(map(shortened, widths))} bits, expected 4"
        raise QuantizedError(codes.shard.path, f"{codes.name} {problem}", _REMEDY)
    if name + "_g_idx" in tensors:
        problem = f"{name}_g_idx assigns columns to groups in another order (actorder)"
        raise QuantizedError(codes.shard.path, problem, _REMEDY)
    stated = tensors.get(name + "_shape")
    if stated is None:
        problem = f"{codes.name} has no shape: {name}_shape is missing"
        raise CheckpointError(codes.shard.path, problem, _AGAIN)
    _expect(stated, ("I64", "I32"), (len(codes.shape),))
    blocks = [args for args in weights if args.get("num_bits") == 4]
    stride = codes.shape[-1] * 8
    shape = _shape(codes, scale, stated, blocks, files)
    grid = grid_of(codes, shape, scale, _block(blocks, shape, scale))
    zero = tensors.get(name + "_zero_point")
    if zero is not None:
        rows = -(-grid.rows // 8)
        _expect(zero, ("I32",), (*codes.shape[:-2], rows, grid.columns))
        if len(shape) > 2:
            problem = f"{zero.name} has zero points for several matrices, which are not read"
            raise QuantizedError(codes.shard.path, problem, _REMEDY)
        grid = replace(grid, zero=zero, zero_bits=4)
    made = name, "F32", shape, codes.shard
    return PackedCodes(*made, codes, grid, INT4, stride, other=(stated,))


def _shape(
    codes: TensorSpec, scale: TensorSpec, stated: TensorSpec, weights: list[Any], files: Files
) -> tuple[int, ...]:
    """The shape of the values: from the scales if they show it, else as it is stored.

    One read for each weight would take long for many weights on the Hub. Where the scales show the
    shape, it is compared with the stored one when the weight is read.
    """
    words = codes.shape[-1]
    groups = scale.shape[-1] if scale.shape else 1
    stated_sizes = [args.get("group_size") for args in weights]
    sizes = [size for size in stated_sizes if type(size) is int and size > 0]
    fitting = [size for size in sizes if -(-groups * size // 8) == words]
    if sizes and groups > 1:
        columns = groups * (fitting or sizes)[0]
    else:
        columns = stored_shape(files, stated)[-1]
    if -(-columns // 8) != words:
        problem = f"{codes.name} has room for {words * 8} columns, but its shape has {columns}"
        raise CheckpointError(codes.shard.path, problem, _AGAIN)
    return *codes.shape[:-1], columns


def _block(weights: list[Any], shape: tuple[int, ...], scale: TensorSpec) -> tuple[int, int] | None:
    """The size of a block that the config states for a tensor; None if it states none."""
    for args in weights:
        block = pair_of(args.get("block_structure"))
        size = args.get("group_size")
        if block is None and isinstance(size, int) and size > 0:
            block = 1, size
        if block is None or len(shape) < 2:
            continue
        grid = math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1])
        if grid == scale.shape[-2:] or len(weights) == 1:
            return block
    return None


def _refuse_other_block(
    grid: Grid, block: tuple[int, int], scale: TensorSpec, codes: TensorSpec
) -> None:
    """Refuse scales that do not have the only block size of their format."""
    if grid.block != block and grid.matrix[1] != block[1]:
        problem = f"{scale.name} is {scale.shape} for {codes.name}, expected one for each"
        raise CheckpointError(scale.shard.path, f"{problem} {block[1]} columns", _AGAIN)


def _expect(part: TensorSpec, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if part.dtype not in dtypes or part.shape != shape:
        expected = f"{' or '.join(dtypes)} {shape}"
        problem = f"{part.name} is {part.dtype} {part.shape}, expected {expected}"
        raise CheckpointError(part.shard.path, problem, _AGAIN)


ENCODING = Encoding(FORMAT, find, METHODS)
