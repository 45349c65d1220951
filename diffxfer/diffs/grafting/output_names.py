"""The names under which a graft stores its tensors: the target's, without wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.diffs.matching.buffers import is_buffer
from diffxfer.diffs.matching.names import canonical
from diffxfer.diffs.matching.wrappers import unwrapped, without_modules

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffxfer.diffs.grafting.pairing import Output


def stored_names(output: Output) -> Callable[[str], str]:
    """A function that gives the output name of a tensor of the target, by its compared name.

    Args:
        output: the matching.
    """
    wrapped, stored = _has_modules(output), output.role.stored

    def name_of(name: str) -> str:
        found = stored.get(name, name)
        return without_modules(found) if wrapped else found

    return name_of


def names_of_parts(output: Output) -> Callable[[str], str]:
    """A function that gives the output name of a tensor in the target's files, by its name there.

    Args:
        output: the matching.
    """
    wrapped, on_disk = _has_modules(output), output.role.checkpoint.weights.on_disk
    buffers = [name for name, spec in on_disk.items() if is_buffer(name, spec)]
    clean = unwrapped(on_disk.keys(), buffers, output.role.name)
    return lambda name: without_modules(clean[name]) if wrapped else clean[name]


def _has_modules(output: Output) -> bool:
    """Whether ``module.`` in the target's names is a wrapper: finetuned does not have it."""
    return any(wraps(spec.name, difference.name) for difference, spec in output.match.grafts)


def wraps(name: str, other: str) -> bool:
    """Whether ``module.`` is a wrapper in a name: the other role's name is equal without it.

    Args:
        name: a name in one role.
        other: the name of the same tensor in another role.
    """
    if name == other or "module." not in name or without_modules(name) == name:
        return False
    return without_modules(other) == other and canonical(name) == canonical(other)
