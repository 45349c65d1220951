"""The names and arguments of the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

KERNELS: Mapping[str, tuple[str, ...]] = {
    "transfer": ("count", "alpha"),
    "apply": ("count", "alpha"),
    "convert": ("count",),
    "check": ("count",),
    "subtract": ("count", "array", "array"),
    "store": ("count", "array", "array"),
    "contrast": ("count", "array", "array"),
    "distances": ("count", "array", "array"),
    "gains": ("count", "array", "array"),
    "restore": ("count",),
    "give_back": ("count",),
    "equal": ("count",),
    "low_rank": (*("count",) * 9, "alpha", "array"),
    "decode_e4m3": ("count",) * 9,
    "decode_int8": ("count",) * 9,
    "decode_nibbles": ("count",) * 12,
    "decode_transposed": ("count",) * 4,
    "encode": ("count",) * 12,
    "extremes": ("count",) * 9,
    "lost": ("count",),
    "narrow": ("count",),
    "count_kinds": ("count",) * 5,
    "split": ("count",) * 5,
    "join": ("count",) * 2,
    "quantise": ("count",) * 5,
    "dequantise": ("count",) * 4,
    "stray": ("count", "array", "array"),
}
"""The kernels, and the arguments of each after its pointers to elements."""

ENTRY = "diffxfer_kernel"
SCRATCH = 8 * 256
"""The number of float64 in the first array of a kernel that sums."""
TOTALS = 10
"""The number of float64 in the second array; a kernel may use fewer."""
