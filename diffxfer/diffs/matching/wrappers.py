"""Wrappers: segments that training tools leave in tensor names.

`torch.compile` adds ``_orig_mod.``, FSDP ``_fsdp_wrapped_module.``, activation checkpointing
``_checkpoint_wrapped_module.``, and `DataParallel`, DDP and averaged models ``module.``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from diffxfer.errors import MatchError

if TYPE_CHECKING:
    from collections.abc import Collection

_CERTAIN = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?=.)"
)
_MODULE = re.compile(r"(?<![^.])module\.(?=.)")


def without_modules(name: str) -> str:
    """A name without any ``module.``, whether it is a wrapper or a module of the model."""
    return _MODULE.sub("", name) if "module." in name else name


def unwrapped(names: Collection[str], besides: Collection[str], role: str) -> dict[str, str]:
    """The names of a role's tensors without wrappers.

    ``module.`` is removed if every name begins with it. Elsewhere it may belong to the model, so
    only pairing ignores it.

    Args:
        names: the names on disk.
        besides: those of `names` that a wrapper may have added itself, such as ``n_averaged``;
            they need not begin with ``module.``.
        role: the role, for messages.

    Returns:
        The new name of each, in the same order.

    Raises:
        MatchError: if two names become equal.
    """
    found = {name: _CERTAIN.sub("", name) if "_" in name else name for name in names}
    while _all_lead_with_module(found, besides):
        found = {name: new.removeprefix("module.") for name, new in found.items()}
        found = {name: _CERTAIN.sub("", new) for name, new in found.items()}
    if len(set(found.values())) < len(found):
        _refuse_collision(found, role)
    return found


def _all_lead_with_module(found: dict[str, str], besides: Collection[str]) -> bool:
    leading = [new.startswith("module.") for name, new in found.items() if name not in besides]
    return bool(leading) and all(leading)


def _refuse_collision(found: dict[str, str], role: str) -> None:
    first: dict[str, str] = {}
    for name, new in found.items():
        if new in first:
            raise MatchError(
                (),
                f"{first[new]} and {name} in {role} are both named {new} once the wrappers of"
                " training are removed",
                "save the model again without the duplicate",
            )
        first[new] = name
