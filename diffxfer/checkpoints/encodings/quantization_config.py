"""What a config says of how weights are quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.quantized import CONFIG_KEYS
from diffxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.json_edit import KeyPath

_MAX_BLOCK = 1 << 40


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The part of a config that describes quantised weights.

    Attributes:
        method: ``quant_method``, such as ``"fp8"``; empty if it states none.
        values: the whole part.
    """

    method: str
    values: Mapping[str, Any]

    def block(self, folder: Path) -> tuple[int, int] | None:
        """``weight_block_size``: rows and columns of a block; None if it states none.

        Args:
            folder: the checkpoint, for messages.

        Raises:
            CheckpointError: if it is no pair of positive integers.
        """
        stated = self.values.get("weight_block_size")
        found = pair_of(stated)
        if stated is not None and found is None:
            told = shortened(stated)
            problem = f"states weight_block_size {told}, expected two positive integers"
            raise CheckpointError(folder / "config.json", problem, "download it again")
        return found


def paths_to_quantization(config: Mapping[str, Any]) -> list[KeyPath]:
    """Where a config describes how weights are quantised.

    Args:
        config: ``config.json``.
    """
    nested = [(name, part) for name, part in config.items() if isinstance(part, dict)]
    top: list[KeyPath] = [(key,) for key in CONFIG_KEYS if key in config]
    return top + [(name, key) for name, part in nested for key in CONFIG_KEYS if key in part]


def shortened(value: object) -> str:
    """A value of a config, as a message shows it.

    Args:
        value: any JSON value.
    """
    return str(value)[:40]


def pair_of(value: object) -> tuple[int, int] | None:
    """Two positive integers of a JSON list; None for anything else.

    Args:
        value: a value of a config.
    """
    if not isinstance(value, list) or len(value) != 2:
        return None
    if not all(type(each) is int and 0 < each < _MAX_BLOCK for each in value):
        return None
    return value[0], value[1]


def read_quantization(config: Mapping[str, Any]) -> QuantizationConfig:
    """Find the description in a config, or in a part of it such as ``text_config``.

    Args:
        config: ``config.json``.
    """
    parts: list[Mapping[str, Any]] = [
        config,
        *(part for part in config.values() if isinstance(part, dict)),
    ]
    for part in parts:
        for key in CONFIG_KEYS:
            found = part.get(key)
            if isinstance(found, dict) and found:
                return QuantizationConfig(str(found.get("quant_method") or ""), found)
    return QuantizationConfig("", {})
