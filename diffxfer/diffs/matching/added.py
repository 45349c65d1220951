"""What fine-tuning added to a model: a task head, which has no counterpart in base.

It has no difference either: it is carried over whole, or not at all, as the user says. Where it is
carried over, it takes the place of the head that only base and target have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.diffs.matching.names import (
    is_head,
    is_head_name,
    is_in_block,
    is_known_vocabulary,
)
from diffxfer.diffs.matching.parts import body_of, is_under, stack_of
from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Collection

CHOICES = ("refuse", "bring", "drop")
"""What can be done with what only finetuned has; the first is the default."""


def check_added(choice: str) -> None:
    """Refuse what `--added` cannot be.

    Raises:
        OptionError: for anything but one of `CHOICES`.
    """
    if choice not in CHOICES:
        raise OptionError("--added", f"{choice!r} is unknown", f"use one of {', '.join(CHOICES)}")


def find_added(
    lonely: Collection[str], paired: Collection[str], base: Collection[str]
) -> frozenset[str]:
    """Which of the tensors that only finetuned has may be a head: modules that base has not.

    A tensor in one of base's layers, or in a module that base has with other tensors, is none:
    there, finetuned and base are different architectures. Where no layer has a counterpart, the
    names are others, and nothing tells a head.

    Args:
        lonely: names that only finetuned has.
        paired: its other names.
        base: every name that base has, under finetuned's names where it has a counterpart.
    """
    if not lonely or not any(map(is_in_block, paired)):
        return frozenset()
    stacks = {stack_of(name) for name in base if is_in_block(name)}
    modules = {name.rpartition(".")[0] for name in base}
    return frozenset(
        name
        for name in lonely
        if name.rpartition(".")[0] not in modules - {""}
        and not (is_in_block(name) and stack_of(name) in stacks)
    )


def find_replaced(
    lonely: Collection[str], paired: Collection[str], *, keeps_words: bool
) -> frozenset[str]:
    """Which tensors without a counterpart are the head whose place an added one takes.

    Args:
        lonely: names of base, or of the target, that finetuned has no counterpart for.
        paired: its other names.
        keeps_words: whether finetuned has a head for words beside the added one, so that it must
            not be lost.
    """
    stacks = {stack_of(name) for name in paired if is_in_block(name)}
    body = body_of(paired)
    return frozenset(
        name
        for name in lonely
        if not (is_in_block(name) and stack_of(name) in stacks)
        and not (keeps_words and is_head(name))
        and (is_head_name(name) or (body and _is_beside(name, body)))
    )


def _is_beside(name: str, body: str) -> bool:
    return not is_under(name, body) and not is_known_vocabulary(name)


def find_added_buffers(
    buffers: Collection[str], added: Collection[str], others: Collection[str]
) -> frozenset[str]:
    """Which buffers belong to what finetuned brings, as a normalization's statistics do.

    Args:
        buffers: names of finetuned's.
        added: names of the tensors that it brings.
        others: names of its other tensors, whose modules are no part of what it brings.
    """
    inner = {module for name in others for module in _modules_of(name)}
    new = {module for name in added for module in _modules_of(name)} - inner
    return frozenset(name for name in buffers if not new.isdisjoint(_modules_of(name)))


def _modules_of(name: str) -> list[str]:
    """The modules around a tensor, each within the one before it."""
    segments = name.split(".")
    return [".".join(segments[:count]) for count in range(1, len(segments))]
