"""The experts of gpt-oss: mxfp4, stored transposed, as ``*_blocks`` and ``*_scales``.

Blocks have the shape (experts, rows, groups, 16), two codes a byte, the lower half first; scales
(experts, rows, groups) are exponents of 2 with bias 127. The decoded tensor has the shape
(experts, groups·32, rows). See `transformers.integrations.mxfp4.convert_moe_packed_tensors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.encodings.encoding import Encoding
from diffxfer.checkpoints.encodings.scaled_codes import E2M1, PackedCodes, addresses
from diffxfer.checkpoints.encodings.scales import Grid, checked_scales
from diffxfer.checkpoints.shared import Together
from diffxfer.checkpoints.stored import StoredTensor
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffxfer.checkpoints.stored import Files, TensorSpec

FORMAT = "mxfp4 of gpt-oss"
METHODS = ("mxfp4",)
BLOCKS, SCALES = "_blocks", "_scales"
_AGAIN = "download or save it again"
_EXPONENTS = 0


@dataclass(frozen=True, slots=True)
class TransposedCodes(StoredTensor):
    """Values in float32: the value of a 4-bit code times a power of 2.

    Attributes:
        blocks: the codes.
        scales: the exponents.
    """

    blocks: TensorSpec
    scales: TensorSpec

    @property
    def written_dtype(self) -> str:
        """bfloat16, which holds every value exactly."""
        return "BF16"

    @property
    def encoding(self) -> str:
        """The kind of number, and the size of a group."""
        return "E2M1, groups of 32, transposed"

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The codes and the exponents."""
        return self.blocks, self.scales

    def read(self, files: Files, start: int, buffer: memoryview) -> None:
        """Decode elements: of one expert after the other."""
        each = self.shape[1] * self.shape[2]
        done, count = 0, len(buffer) // 4
        while done < count:
            expert, inside = divmod(start + done, each)
            some = min(each - inside, count - done)
            self._decode(files, expert, inside, buffer[done * 4 : (done + some) * 4])
            done += some

    def transposed(self) -> PackedCodes:
        """The values in the order of their codes."""
        experts, columns, rows = self.shape
        grid = Grid(self.scales, (rows, columns), (1, 32))
        place = self.name, self.dtype, (experts, rows, columns), self.shard
        return PackedCodes(*place, self.blocks, grid, E2M1, columns)

    def _decode(self, files: Files, expert: int, start: int, buffer: memoryview) -> None:
        import numpy as np

        from diffxfer.kernels.native import kernel

        _, rows, groups, _ = self.blocks.shape
        size = rows * groups * 20
        found = files.shared.of(self, expert, size, lambda: _Expert(rows * groups))

        def read(_: int) -> None:
            begin = expert * rows * groups
            self.blocks.read(files, begin * 16, found.codes.data)
            exponents = files.read(self.scales, begin, rows * groups, _EXPONENTS)
            found.scales[:] = checked_scales(exponents, self.scales, begin)

        # A row of values has one code of every row of blocks, so the whole expert is read, once.
        found.together.finish(read)
        codes, scales, table = found.codes, found.scales, np.array(E2M1, np.float32)
        decode = kernel("decode_transposed", ("U8", "F32", "F32", "F32"))
        place = start, len(buffer) // 4, rows, groups
        decode(*addresses(codes, table, scales, buffer), *place)


class _Expert:
    """The codes and scales of an expert, which one thread reads for all.

    Args:
        count: the number of groups.
    """

    def __init__(self, count: int) -> None:
        import numpy as np

        self.codes, self.scales = np.empty(count * 16, np.uint8), np.empty(count, np.float32)
        self.together = Together(1)


def find(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Iterator[TransposedCodes]:
    """Find the blocks that have scales.

    Raises:
        CheckpointError: if blocks lack scales or scales lack blocks, or their shapes do not fit.
    """
    del config
    for name, blocks in tensors.items():
        if name.endswith(SCALES) and blocks.dtype == "U8":
            weight = name.removesuffix(SCALES)
            if weight + BLOCKS not in tensors:
                problem = f"{name} has no weight: {weight}{BLOCKS} is missing"
                raise CheckpointError(blocks.shard.path, problem, _AGAIN)
        if not name.endswith(BLOCKS) or blocks.dtype != "U8":
            continue
        weight = name.removesuffix(BLOCKS)
        scales = tensors.get(weight + SCALES)
        if scales is None:
            problem = f"{name} has no scales: {weight}{SCALES} is missing"
            raise CheckpointError(blocks.shard.path, problem, _AGAIN)
        if len(blocks.shape) != 4 or blocks.shape[-1] != 16:
            problem = f"{name} is {blocks.shape}, expected (experts, rows, groups, 16)"
            raise CheckpointError(blocks.shard.path, problem, _AGAIN)
        if (scales.dtype, scales.shape) != ("U8", blocks.shape[:-1]):
            expected = f"U8 {blocks.shape[:-1]}"
            problem = f"{scales.name} is {scales.dtype} {scales.shape}, expected {expected}"
            raise CheckpointError(scales.shard.path, problem, _AGAIN)
        experts, rows, groups, _ = blocks.shape
        shape = experts, groups * 32, rows
        yield TransposedCodes(weight, "F32", shape, blocks.shard, blocks, scales)


ENCODING = Encoding(FORMAT, find, METHODS)
