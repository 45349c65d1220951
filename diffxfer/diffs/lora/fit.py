"""Forms that PEFT can store, as the modules of the loaded model decide."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diffxfer.diffs.delta.loaded_names import EMBEDDING, LINEAR
from diffxfer.diffs.lora.parts import Form

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.diffs.delta.loaded_names import LoadedNames
    from diffxfer.diffs.lora.names import PeftNames
    from diffxfer.diffs.lora.parts import Part


def fit_parts(parts: Sequence[Part], names: PeftNames, rest: str) -> list[Part]:
    """Give each part a form that its module can have in PEFT.

    Args:
        parts: the parts, with the forms that their names and shapes suggest.
        names: the names that PEFT uses.
        rest: what to do with tensors other than the weights of linear layers.
    """
    loaded = names.loaded
    if loaded is None:
        return [*parts]
    fitted = [_fitted(part, loaded, rest) for part in parts]
    return fitted if rest == "drop" else _kept_together(fitted, loaded)


def _fitted(part: Part, loaded: LoadedNames, rest: str) -> Part:
    kind = loaded.kinds.get(part.module)
    wanted = {Form.FACTORS: LINEAR, Form.EMBEDDING: EMBEDDING}.get(part.form)
    if kind is None or wanted is None:
        return part
    if kind != wanted:
        why = f"{kind} has no factors in PEFT" if rest == "lora" else ""
        return replace(part, form=Form.DROPPED if rest == "drop" else Form.WHOLE, why=why)
    # PEFT 0.21 takes these names for those of experts, as older releases of transformers had
    # them, and looks for stacked parameters instead.
    leaves = {*loaded.expert_leaves, "gate"} if loaded.expert_leaves else ()
    return replace(part, as_parameter=part.module.rpartition(".")[2] in leaves)


def _kept_together(parts: Sequence[Part], loaded: LoadedNames) -> list[Part]:
    """The parts, where a bare parameter has its whole module stored with it."""
    keepers = {
        part.module
        for part in parts
        if part.form is Form.IMPOSSIBLE and part.module in loaded.kinds and not part.why
        if len(part.difference.shape) < 3
    }
    found = []
    for part in parts:
        keeper = next((k for k in sorted(keepers) if part.name.startswith(f"{k}.")), "")
        form = Form.WHOLE if keeper else part.form
        found.append(replace(part, form=form, keeper=keeper))
    return found
