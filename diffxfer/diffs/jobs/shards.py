"""Cutting an output into shards."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.shard_index import names_like
from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.streaming.plan import TensorTask

_UNITS = {"B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cut_shards(tasks: Sequence[TensorTask], max_shard_bytes: int | None) -> list[TensorTask]:
    """Assign the tensors to shards of limited size, in order.

    Args:
        tasks: the tasks, with shard names of an input.
        max_shard_bytes: the most bytes of tensors in a shard, except that a larger tensor has a
            shard to itself; None to keep the input's shards.
    """
    if max_shard_bytes is None:
        return list(tasks)
    written = [task for task in tasks if task.shard is not None]
    numbers: list[int] = []
    number, size = 0, 0
    for task in written:
        nbytes = task.elements * task.itemsize
        if size and size + nbytes > max_shard_bytes:
            number, size = number + 1, 0
        size += nbytes
        numbers.append(number)
    total = number + 1
    like = names_like(task.shard for task in written if task.shard is not None)
    names = [like.single if total == 1 else like.shard(n + 1, total) for n in range(total)]
    renamed = [replace(task, shard=names[n]) for task, n in zip(written, numbers, strict=True)]
    return [*(task for task in tasks if task.shard is None), *renamed]


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Parse a number of bytes such as ``5GB`` or ``500MB``; a GB is 10⁹ bytes, as on the Hub.

    Args:
        text: the text.
        option: the option that it was given to, for the message.

    Raises:
        OptionError: if it is not a size.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(?:([KMGT])B?|B)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "B").upper()]) if found else 0
    if size <= 0:
        problem = f"{text!r} is not a size"
        raise OptionError(option, problem, "give one such as 5GB or 500MB")
    return size
