"""The layout of a shard to be written.

Tensors are placed as `safetensors.save_file` places them, so a file written from a layout is byte
for byte the file that `save_file` would write.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.checkpoints.header import PREFIX
from diffxfer.checkpoints.stored import BITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_RANK = {dtype: rank for rank, dtype in enumerate(BITS)}


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The layout of a shard.

    Attributes:
        header: the bytes before the data, including length and padding.
        starts: the first byte of each tensor in the file.
        size: of the whole file, in bytes.
    """

    header: bytes
    starts: Mapping[str, int]
    size: int


def layout_shard(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> ShardLayout:
    """Lay out a shard as `safetensors.torch.save_file(…, metadata={"format": "pt"})` does.

    Args:
        tensors: name, dtype and shape of each.

    Returns:
        The header's bytes and where each tensor begins.
    """
    # Entry by entry: `json.dumps` of 60,000 entries at once took 50 MB and twice the time.
    entries = ['"__metadata__":{"format":"pt"}']
    offset = 0
    offsets: dict[str, int] = {}
    for name, dtype, shape in sorted(tensors, key=lambda t: (_RANK[t[1]], t[0].encode())):
        end = offset + math.prod(shape) * BITS[dtype] // 8
        sizes = ",".join(map(str, shape))
        entries.append(
            f'{json.dumps(name, ensure_ascii=False)}:{{"dtype":"{dtype}","shape":[{sizes}],'
            f'"data_offsets":[{offset},{end}]}}'
        )
        offsets[name] = offset
        offset = end
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    header = PREFIX.pack(len(text)) + text
    starts = {name: len(header) + begin for name, begin in offsets.items()}
    return ShardLayout(header, starts, len(header) + offset)
