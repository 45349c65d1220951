"""What of an adapter can be moved to another base, and whether that base is related."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.checkpoints.adapters.config import ADAPTER_WEIGHTS
from diffxfer.checkpoints.stored import FLOATS
from diffxfer.diffs.delta.right_base import is_resized
from diffxfer.diffs.matching.names import pair_names
from diffxfer.diffs.matching.role import read_role
from diffxfer.diffs.relations.kinship import Kinship, kinship_of_move
from diffxfer.errors import CheckpointError, MatchError, OptionError

if TYPE_CHECKING:
    from diffxfer.checkpoints.adapters.adapter import Adapter
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.grafting.move_tokens import TokenMove
    from diffxfer.diffs.grafting.options import GraftOptions
    from diffxfer.diffs.matching.role import Role

_REMEDY = (
    "run: diffxfer transfer ADAPTER BASE TARGET -o OUT{}, and then:"
    " diffxfer extract OUT TARGET -o MOVED --as lora"
)


def refuse_choices(adapter: Adapter, options: GraftOptions) -> None:
    """Refuse options that no moved adapter can follow.

    Args:
        adapter: the adapter.
        options: the options of `apply_diff`.

    Raises:
        OptionError: for alpha 0, and for a choice by name if the adapter changes parameters: PEFT
            has one entry for a module.
    """
    selection = options.selection
    if not selection.alpha and not selection.alpha_for:
        raise OptionError(
            "--alpha", "0 leaves no factors, so that the adapter would be empty", "give another"
        )
    if not adapter.config.parameters or not (
        selection.alpha_for or selection.include or selection.exclude
    ):
        return
    raise OptionError(
        "--as",
        "lora moves an adapter with target_parameters only as a whole",
        "leave out --alpha-for, --include and --exclude, or graft it without --as lora",
    )


def refuse_bound(adapter: Adapter) -> None:
    """Refuse tensors that hold values of the adapter's own base.

    Args:
        adapter: the adapter.

    Raises:
        CheckpointError: if it has such tensors.
    """
    found = [(spec, "is stored whole") for spec in adapter.whole.values()]
    found += [(spec, "has rows of tokens that are stored whole") for spec in adapter.rows.values()]
    if not found:
        return
    spec, what = found[0]
    more = f" ({len(found)} such tensors)" if len(found) > 1 else ""
    raise CheckpointError(
        f"{adapter.place.label}/{ADAPTER_WEIGHTS}",
        f"{spec.name} {what}, so it holds values of the adapter's own base and cannot be moved"
        f" without it{more}",
        _REMEDY.format(""),
    )


def refuse_scale_of_dora(alpha: float) -> None:
    """Refuse to scale a DoRA: its Δ is not proportional to its factors.

    Args:
        alpha: the scale; 0 leaves the tensor out.

    Raises:
        OptionError: if it is neither 0 nor 1.
    """
    if alpha not in (0.0, 1.0):
        raise OptionError(
            "--alpha",
            f"is {alpha:g}, and the Δ of a DoRA is not proportional to its factors",
            f"leave it out, or {_REMEDY.format(' --alpha A')}",
        )


def warn_of_dora(adapter: Adapter, moved: TokenMove) -> list[str]:
    """Say what PEFT computes with a DoRA that is moved as it is.

    Args:
        adapter: the adapter.
        moved: how its tokens move.

    Raises:
        CheckpointError: if tokens of a module with magnitudes move, or magnitudes do not fit.
    """
    if not adapter.config.dora:
        return []
    where = f"{adapter.place.label}/{ADAPTER_WEIGHTS}"
    for module, several in adapter.factors.items():
        for factors in several:
            assert factors.b is not None
            assert factors.magnitude is not None
            name, shape = factors.magnitude.name, factors.magnitude.shape
            if factors.magnitude.elements != factors.b.shape[0]:
                problem = f"{name} has the shape {shape}, expected ({factors.b.shape[0]},)"
                raise CheckpointError(where, problem, "save the adapter again")
            if module in moved.modules:
                problem = f"{name} is a magnitude of DoRA, and the tokens of {module} move"
                raise CheckpointError(where, problem, _REMEDY.format(""))
    return [
        "the magnitudes m of this DoRA are those of its own base: on the target, PEFT computes"
        " m·(target + B·A)/‖target + B·A‖, which is not target + Δ; diffxfer transfer ADAPTER BASE"
        " TARGET gives that"
    ]


def fixed_part(adapter: Adapter, base: Checkpoint | None, moved: TokenMove) -> Adapter:
    """The factors whose tokens do not move, to be checked against the target.

    Args:
        adapter: the adapter.
        base: its own base, if it is on this machine.
        moved: how its tokens move.
    """
    # Magnitudes are checked by themselves: they are moved without values of base.
    factors = {
        name: [replace(each, magnitude=None) for each in found]
        for name, found in adapter.factors.items()
        if name not in moved.modules
    }
    # An embedding with as many rows as base's is a copy of it, whatever the target has.
    is_copy = base is not None and not is_resized(adapter, base)
    return replace(adapter, factors=factors, copies={} if is_copy else adapter.copies)


def compare_bases(base: Checkpoint | None, target: Role, *, allow_unrelated: bool) -> Kinship:
    """Compare an adapter's own base with the target.

    Args:
        base: the base, if it is on this machine.
        target: the target.
        allow_unrelated: accept unrelated models.

    Returns:
        How they relate; without relations if they cannot be compared.

    Raises:
        RelatednessError: if they are unrelated, unless `allow_unrelated` is set.
    """
    if base is None:
        return Kinship((), [], (), {})
    ours, theirs = read_role(base).checkpoint.tensors, target.checkpoint.tensors
    try:
        names = pair_names(ours, theirs, ("base", "the target"))
    except MatchError:
        return Kinship((), [], (), {})
    pairs = [
        (ours[name], theirs[known])
        for name, known in names.items()
        if ours[name].shape == theirs[known].shape
        and {ours[name].dtype, theirs[known].dtype} <= FLOATS
    ]
    return kinship_of_move(pairs, allow_unrelated=allow_unrelated)
