"""How much disk a chain takes at most, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.recycling.chain import Step, Verb, to_remove

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.recycling.recipe import Recipe

# Float32 weights and AdamW's two moments, in two states at a time, beside the last weights.
_TRAINING_BYTES_A_PARAMETER = 4 * (3 * 2 + 1)
_NARROWEST_BYTES = 2


def peak_bytes(
    pending: Sequence[Step], steps: Sequence[Step], recipe: Recipe, sizes: Mapping[str, int]
) -> int:
    """The disk that the steps to do take at most, beyond what is there.

    Args:
        pending: the steps to do.
        steps: of the whole chain.
        recipe: what stays.
        sizes: bytes of the weights of every model that the recipe names.

    Returns:
        Bytes. What a command of the user's own needs beside its output is not known.
    """
    known = {Path(path): size for path, size in sizes.items()}
    for step in steps:
        if step.out is not None and step.verb is not Verb.SCORE:
            known[step.out] = _output(step, known)
    done = {step.key for step in steps} - {step.key for step in pending}
    there: set[Path] = set()
    peak = 0
    for step in pending:
        now = sum(known[path] for path in there)
        peak = max(peak, now + _while_doing(step, known, recipe))
        if step.out is not None and step.verb is not Verb.SCORE:
            there.add(step.out)
        done.add(step.key)
        there -= set(to_remove(steps, done, recipe.keep))
    return peak


def _output(step: Step, known: Mapping[Path, int]) -> int:
    """The size of what a step makes: a graft's is its base's, any other's what it is made from."""
    grafts = step.verb in (Verb.GRAFT, Verb.CHOOSE)
    return known[step.reads[1] if grafts else step.reads[0]]


def _while_doing(step: Step, known: Mapping[Path, int], recipe: Recipe) -> int:
    """What a step takes until it is done."""
    if step.verb is Verb.SCORE:
        return 0
    made = _output(step, known)
    if step.verb is Verb.TUNE and recipe.train is not None and recipe.train.command is None:
        made += made // _NARROWEST_BYTES * _TRAINING_BYTES_A_PARAMETER
    return made
