"""Which kernels there are, and what they take."""

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
    "contrast": ("count", "array", "array"),
    "restore": ("count",),
    "give_back": ("count",),
    "equal": ("count",),
}
"""The functions of `loops`, and what each takes after its pointers to elements."""

ENTRY = "diffxfer_kernel"
SCRATCH = 3 * 256
"""How many float64 the first array of a kernel that sums has."""
TOTALS = 4
"""How many float64 the second one has."""
