"""Task heads: tensors that fine-tuning added and that have no counterpart in base.

They have no difference. The user decides whether they are brought whole or dropped. A head that is
brought replaces the head that only base and target have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.diffs.matching.names import (
    is_head,
    is_head_name,
    is_in_block,
    is_known_vocabulary,
)
from diffxfer.diffs.matching.parts import (
    body_of,
    is_in_tower,
    is_under,
    modules_of,
    stack_of,
    towers_of,
)
from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Collection

CHOICES = ("refuse", "bring", "drop")
"""What can be done with tensors that only finetuned has; the first is the default."""


def check_added(choice: str) -> None:
    """Refuse an unknown value of `--added`.

    Raises:
        OptionError: if it is not one of `CHOICES`.
    """
    if choice not in CHOICES:
        raise OptionError("--added", f"{choice!r} is unknown", f"use one of {', '.join(CHOICES)}")


def find_added(
    lonely: Collection[str], paired: Collection[str], base: Collection[str]
) -> frozenset[str]:
    """The tensors that only finetuned has and that may be a head: modules that base lacks.

    These are not heads:

    - a tensor in one of base's layers, or in a module that base has with other tensors:
      finetuned and base then differ in architecture;
    - a token embedding, or a tensor in the body without a head's name: base lacks a part;
    - a head that base has under one more prefix;
    - a language-model head that base has under another prefix, or may tie to its embedding.

    If no layer has a counterpart, the naming differs and no head can be recognised.

    Args:
        lonely: names that only finetuned has.
        paired: its other names.
        base: every name in base, under finetuned's name where it has a counterpart.
    """
    if not lonely or not any(map(is_in_block, paired)):
        return frozenset()
    stacks = {stack_of(name) for name in base if is_in_block(name)}
    modules = {name.rpartition(".")[0] for name in base} - {""}
    body = body_of(paired)
    alone = {*base} - {*paired}
    heads = {end for name in alone if is_known_vocabulary(end := _end(name))}
    prefixed = {end for name in alone if is_head_name(name) for end in _endings(name)}
    return frozenset(
        name
        for name in lonely
        if _end(name) not in heads
        and name not in prefixed
        and (_end(name) != "lm_head.weight" or is_head(name))
        and name.rpartition(".")[0] not in modules
        and not (is_in_block(name) and stack_of(name) in stacks)
        and (is_head_name(name) or not (is_known_vocabulary(name) or is_under(name, body)))
    )


def _end(name: str) -> str:
    """The last two parts of a name, the module's and the tensor's: ``lm_head.weight``."""
    return ".".join(name.split(".")[-2:])


def _endings(name: str) -> list[str]:
    """A name without its first module, without its first two, and so on."""
    segments = name.split(".")
    return [".".join(segments[begin:]) for begin in range(1, len(segments))]


def known_heads(
    addable: Collection[str], paired: Collection[str], lonely: Collection[str]
) -> frozenset[str]:
    """The added heads that have a head's name and do not belong to a tower.

    Args:
        addable: the names that `find_added` found.
        paired: the names that base has too.
        lonely: finetuned's other names.
    """
    towers = towers_of(paired, lonely)
    return frozenset(n for n in addable if is_head_name(n) and not is_in_tower(n, towers))


def find_replaced(
    lonely: Collection[str], paired: Collection[str], *, keeps_words: bool
) -> frozenset[str]:
    """The tensors without a counterpart that form the head that an added head replaces.

    A head beside the body may have any name, unless the model has other parts there, such as a
    vision tower with its projector; then only a known name identifies a head.

    Args:
        lonely: names of base or of the target without a counterpart in finetuned.
        paired: its other names.
        keeps_words: whether finetuned has a language-model head besides the added one, so that
            the language-model head must not be replaced.
    """
    if not lonely:
        return frozenset()
    stacks = {stack_of(name) for name in paired if is_in_block(name)}
    towers, body = towers_of(paired, lonely), body_of(paired)
    tops = {name.partition(".")[0] for name in paired}
    return frozenset(
        name
        for name in lonely
        if not (is_in_block(name) and stack_of(name) in stacks)
        and not (keeps_words and is_head(name))
        and not is_in_tower(name, towers)
        and (is_head_name(name) or (body and not towers and _is_beside(name, tops)))
    )


def _is_beside(name: str, tops: Collection[str]) -> bool:
    """Whether none of a tensor's modules holds tensors that the roles share."""
    return name.partition(".")[0] not in tops and not is_known_vocabulary(name)


def find_added_buffers(
    buffers: Collection[str], added: Collection[str], others: Collection[str]
) -> frozenset[str]:
    """The buffers that belong to tensors that finetuned brings, such as a BatchNorm's statistics.

    Args:
        buffers: names of finetuned's buffers.
        added: names of the tensors that it brings.
        others: names of its other tensors; buffers in their modules are not brought.
    """
    inner = {module for name in others for module in modules_of(name)}
    new = {module for name in added for module in modules_of(name)} - inner
    return frozenset(name for name in buffers if not new.isdisjoint(modules_of(name)))
