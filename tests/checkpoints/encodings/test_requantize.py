"""New codes and scales are those of the libraries that define the formats, byte for byte."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffxfer.checkpoints.encodings.requantize import requantize, typical_error
from diffxfer.checkpoints.files import OpenShard, one_at_a_time
from diffxfer.checkpoints.reader import read_shard
from diffxfer.checkpoints.shared import Shared
from diffxfer.checkpoints.stored import BITS, Files, StoredTensor
from diffxfer.streaming.plan import BLOCK_ELEMENTS
from tests.checkpoints.encodings.codings import BLOCK, FP8, INT8, NF4_BLOCKS, blocks, fp8_parts
from tests.checkpoints.encodings.test_references import CASES, UP, compress, opened, read

if TYPE_CHECKING:
    from pathlib import Path

    from diffxfer.checkpoints.stored import TensorSpec
    from tests.checkpoints.encodings.codings import Coding


def matrix(shape: tuple[int, ...]) -> torch.Tensor:
    """Values with a row of zeros, outliers, and both signs of zero."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    made[..., 5, :] = 0
    made[..., :3] *= 50
    made[..., 0, 0] = -0.0
    return made


def as_stored(folder: Path, values: torch.Tensor) -> StoredTensor:
    save_file({"w": values.contiguous()}, folder / "values.safetensors")
    return read_shard(folder / "values.safetensors")["w"]


def written(part: StoredTensor, start: int, count: int) -> np.ndarray[Any, Any]:
    buffer = bytearray(count * BITS[part.dtype] // 8)
    part.read(one_at_a_time(), start, memoryview(buffer))
    return np.frombuffer(buffer, np.uint8)


def check_parts(parts: tuple[StoredTensor, ...], expected: dict[str, torch.Tensor]) -> None:
    assert {part.name for part in parts} == expected.keys()
    rng = np.random.default_rng(1)
    for part in parts:
        whole = expected[part.name].contiguous().reshape(-1).view(torch.uint8).numpy()
        size, count = BITS[part.dtype] // 8, part.elements
        assert np.array_equal(written(part, 0, count), whole), part.name
        for start in map(int, rng.integers(0, count, 12)):
            some = int(rng.integers(1, count - start + 1))
            found = written(part, start, some)
            assert np.array_equal(found, whole[start * size : (start + some) * size]), part.name


@pytest.mark.parametrize(("kind", "stated", "shape"), CASES)
def test_compressed_tensors(
    tmp_path: Path, kind: str, stated: dict[str, Any], shape: tuple[int, int]
) -> None:
    pytest.importorskip("compressed_tensors")
    values = matrix(shape)
    parts, config, decoded = compress(kind, stated, values)
    like = opened(tmp_path / "like", parts, config)[UP]
    made = requantize(as_stored(tmp_path, values), like)
    assert made is not None
    check_parts(made.written, parts)
    bits = decoded.float().contiguous().reshape(-1).numpy().view(np.uint32)
    assert np.array_equal(read(made.decoded, 0, len(bits)), bits)
    assert np.array_equal(read(made.decoded, 7, 200), bits[7:207])


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)])
def test_fp8_of_transformers(
    tmp_path: Path, scale_format: str | None, shape: tuple[int, ...]
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    class Quantizer:
        class quantization_config:  # noqa: N801 as transformers names it
            weight_block_size = (128, 128)
            scale_fmt = scale_format

    values = matrix(shape)
    parts = Fp8Quantize(Quantizer()).convert({UP: values.clone()})
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": scale_format}
    like = opened(tmp_path / "like", parts, {"quantization_config": stated})[UP]
    made = requantize(as_stored(tmp_path, values), like)
    assert made is not None
    check_parts(made.written, parts)
    decode = Fp8Dequantize(Quantizer())._dequantize_one
    decoded = decode(parts[UP], parts[UP + "_scale_inv"], torch.float32)
    bits = decoded.contiguous().reshape(-1).numpy().view(np.uint32)
    assert np.array_equal(read(made.decoded, 0, len(bits)), bits)


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_fp8_in_16_bits(
    tmp_path: Path, dtype: torch.dtype, scale_format: str | None
) -> None:
    """Values are divided by the scales that are stored, as Qwen's models in fp8 have them."""
    values = matrix((200, 300))
    old = fp8_parts(values)
    parts = {UP: old[""], f"{UP}_scale_inv": old["_scale_inv"].to(dtype)}
    stated = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    stated |= {"scale_fmt": scale_format} if scale_format else {}
    like = opened(tmp_path / "like", parts, {"quantization_config": stated})[UP]
    made = requantize(as_stored(tmp_path, values), like)
    assert made is not None
    padded = torch.nn.functional.pad(values, (0, 84, 0, 56))
    most = padded.reshape(2, BLOCK, 3, BLOCK).abs().amax((1, 3))
    scales = 1 / (1 / most * 448)
    scales = torch.exp2(torch.ceil(torch.log2(scales))) if scale_format else scales
    scales = scales.to(dtype)
    wide = blocks(scales.float(), (200, 300), BLOCK, BLOCK)
    codes = (values * (1 / wide)).clamp(-448, 448).to(torch.float8_e4m3fn)
    check_parts(made.written, {UP: codes, f"{UP}_scale_inv": scales})
    bits = (codes.float() * wide).reshape(-1).numpy().view(np.uint32)
    assert np.array_equal(read(made.decoded, 0, len(bits)), bits)


@pytest.mark.parametrize(
    ("coding", "scale"), [(FP8, torch.float8_e4m3fn), (INT8, torch.float8_e8m0fnu)]
)
def test_scales_in_a_dtype_that_their_format_does_not_have(
    tmp_path: Path, coding: Coding, scale: torch.dtype
) -> None:
    parts = coding.parts(torch.ones(20, 30))
    parts = {
        UP + suffix: part.to(scale) if "scale" in suffix else part for suffix, part in parts.items()
    }
    like = opened(tmp_path / "like", parts, coding.config)[UP]
    assert requantize(as_stored(tmp_path, torch.ones(20, 30)), like) is None
    assert typical_error(like) is None


def test_scales_of_fp8_are_positive_for_the_smallest_values(tmp_path: Path) -> None:
    """The reference divides by the largest value of a block, which overflows here."""
    values = torch.zeros(128, 512)
    for block, most in enumerate((1.2e-36, 1e-38, 1e-40)):
        values[0, block * 128 : block * 128 + 5] = most * torch.tensor([1, -0.5, 0.25, -0.125, 0])
    like = opened(tmp_path / "like", FP8.encode({UP: torch.ones(128, 512)}), FP8.config)[UP]
    made = requantize(as_stored(tmp_path, values), like)
    assert made is not None
    scales = written(made.written[1], 0, 4).view(np.float32)
    assert scales.tolist() == [2.0**-126] * 3 + [1.0]
    found = read(made.decoded, 0, values.numel()).view(np.float32)
    # Below 2⁻⁶ the steps of E4M3 are 2⁻⁹; above, an eighth of the value.
    steps = np.maximum(np.abs(values.numpy()) / 8, 2.0**-135)
    assert (np.abs(found.reshape(128, 512) - values.numpy()) <= steps / 2).all()


def test_gpt_oss_gives_back_what_its_codes_can_say(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 96, 4, 16), dtype=torch.uint8, generator=generator)
    blocks[..., 0] |= 7  # every group has the code of 6, so the scale is known
    scales = torch.randint(100, 140, (3, 96, 4), dtype=torch.uint8, generator=generator)
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    stated = {"quantization_config": {"quant_method": "mxfp4"}}
    like = opened(tmp_path / "like", parts, stated)[name]
    made = requantize(as_stored(tmp_path, values), like)
    assert made is not None
    # Quantised in the order of the codes, in which a group is consecutive.
    bits = values.mT.contiguous().reshape(-1).numpy().view(np.uint32)
    found = read(made.decoded, 0, len(bits))
    # −0.0 has the code of 0.0.
    assert np.array_equal(found.view(np.float32), bits.view(np.float32))
    by_name = {part.name: part for part in made.written}
    new = by_name[f"{name}_scales"]
    assert np.array_equal(written(new, 0, new.elements), scales.reshape(-1).numpy())
    again = by_name[f"{name}_blocks"]
    codes = torch.from_numpy(written(again, 0, again.elements).copy()).reshape(blocks.shape)
    decoded = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
    assert torch.equal(decoded, values)
    assert np.array_equal(written(again, 77, 1000), codes.reshape(-1).numpy()[77:1077])


def mxfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales by the rule of triton_kernels' `downcast_to_mxfp_torch`, rounding up.

    The scale of 32 values is the least power of 2 that is not below their largest / 6, in float32.
    Codes are of the nearest value, of the even one at a tie, and keep the sign of zero.

    Args:
        values: of the shape (experts, columns, rows).
    """
    groups = values.mT.unflatten(-1, (-1, 32))
    sixth = groups.abs().amax(-1) / torch.tensor(6.0)
    # A power of 2 is 0.5 · 2^e; a subnormal number needs the least normal exponent.
    mantissa, exponent = torch.frexp(sixth.double())
    power = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126)
    scales = torch.where(sixth > 0, power + 127, 0)
    size = groups.abs().double() / torch.exp2(power.double())[..., None]
    codes = torch.zeros_like(groups, dtype=torch.int64)
    ladder = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for code, (low, high) in enumerate(pairwise(ladder)):
        middle = (low + high) / 2
        above = size > middle if code % 2 == 0 else size >= middle
        codes = torch.where(above, code + 1, codes)
    codes += 8 * torch.signbit(groups)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    return packed.to(torch.uint8), scales.to(torch.uint8)


def test_gpt_oss_is_quantised_as_its_library_does(tmp_path: Path) -> None:
    values = torch.randn(2, 128, 24, generator=torch.Generator().manual_seed(2))
    scale = torch.exp2(torch.arange(-12.0, 12))
    values[0] *= scale
    # Every tie, from both sides, and both zeros; the largest of the group is 6.
    ties = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -2.5, -5, -0.0, 0])
    values[1, :14, :8] = ties[:, None] * scale[::3]
    values[1, 14:32, :8] = 0
    values[1, 32:64, 0] = 0  # a group of zeros
    values[1, 64:96, 1] *= 1e-39  # subnormal
    values[1, 96:, 2] *= 1e37
    values[0, 3, :] = torch.nextafter(values[0, 4, :], torch.tensor(10.0))
    name = "model.layers.0.mlp.experts.down_proj"
    blocks, scales = mxfp4(values)
    parts = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    like = opened(tmp_path / "like", parts, {"quantization_config": {"quant_method": "mxfp4"}})
    made = requantize(as_stored(tmp_path, values), like[name])
    assert made is not None
    check_parts(made.written, parts)
    # What is said to be stored is what a reader decodes.
    count = values.numel()
    turned = read(made.decoded, 0, count).reshape(2, 24, 128).transpose(0, 2, 1)
    assert np.array_equal(turned.reshape(-1), read(like[name], 0, count))
    assert np.array_equal(read(made.original, 0, count), read(made.decoded, 0, count))
    exact = values.mT.contiguous().reshape(-1).numpy().view(np.uint32)
    assert np.array_equal(read(made.exact, 0, count), exact)
    assert np.array_equal(read(made.exact, 100, 1000), exact[100:1100])


def test_an_encoding_that_cannot_be_written(tmp_path: Path) -> None:
    values = matrix((64, 64))
    parts = {UP + suffix: part for suffix, part in NF4_BLOCKS.parts(values).items()}
    like = opened(tmp_path / "like", parts, NF4_BLOCKS.config)[UP]
    assert requantize(as_stored(tmp_path, values), like) is None


@dataclass(frozen=True, slots=True)
class Counted(StoredTensor):
    """Values in float32, with a count of those that were read."""

    values: np.ndarray[Any, Any]
    counts: list[int]

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return ()

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        del files
        count = len(buffer) // 4
        self.counts.append(count)
        np.frombuffer(buffer, np.float32)[:] = self.values.reshape(-1)[start : start + count]


def computed(
    folder: Path, coding: Coding, shape: tuple[int, ...], threads: int
) -> tuple[int, dict[str, bytes]]:
    """How often a value is computed in chunks by several threads, and what is written."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    like = opened(folder / f"{coding.name}-{threads}", coding.encode({UP: values}), coding.config)
    counts: list[int] = []
    stored = Counted(UP, "F32", shape, like[UP].shard, values.numpy(), counts)
    made = requantize(stored, like[UP])
    assert made is not None
    shared, found = Shared(), {}
    mine = threading.local()

    def read(part: StoredTensor, start: int, count: int) -> bytes:
        if not hasattr(mine, "files"):
            mine.files = Files(OpenShard, shared)
        buffer = bytearray(count * BITS[part.dtype] // 8)
        part.read(mine.files, start, memoryview(buffer))
        return bytes(buffer)

    with ThreadPoolExecutor(threads) as pool:
        for part in made.written:
            chunks = [
                pool.submit(read, part, start, min(BLOCK_ELEMENTS, part.elements - start))
                for start in range(0, part.elements, BLOCK_ELEMENTS)
            ]
            found[part.name] = b"".join([chunk.result() for chunk in chunks])
    return sum(counts), found


@pytest.mark.parametrize("threads", [1, 4])
def test_values_are_computed_at_most_twice_whatever_the_width_and_the_threads(
    tmp_path: Path, threads: int
) -> None:
    """Once for scales, once for codes, where a block has the rows of several chunks."""
    shape = 300, 7168
    count, found = computed(tmp_path, FP8, shape, threads)
    # A thread that has just read a chunk for its scales does not compute it again for its codes.
    assert 300 * 7168 < count <= 2 * 300 * 7168
    assert found == computed(tmp_path / "again", FP8, shape, 5 - threads)[1]


def test_values_of_rows_are_computed_once_for_each_part(tmp_path: Path) -> None:
    shape = 500, 2000
    count, found = computed(tmp_path, INT8, shape, 2)
    # The codes' four chunks have three rows in common with their neighbours.
    assert count == len(found) * 500 * 2000 + 3 * 2000
