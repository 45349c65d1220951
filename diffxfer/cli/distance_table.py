"""Printing how far models are from each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from diffxfer.cli.table import add_columns, folded, make_table, print_facts, print_head, stdout
from diffxfer.diffs.inspection.measures import percent
from diffxfer.errors import listed

if TYPE_CHECKING:
    from rich.table import Table

    from diffxfer.probing.distances import Distances
    from diffxfer.probing.figures import Cell, Figures, GainFigures
    from diffxfer.probing.standouts import Standout

_KINDS = 16
_STANDOUTS = 8
_PAIRED = {"ids": "rows pair by id", "tokens": "rows pair by token string"}


def print_distances(models: Mapping[str, str], found: Distances) -> None:
    """Print how far models are from each other.

    Args:
        models: the models as the user named them, by role.
        found: the distances.
    """
    from rich.text import Text

    out = stdout()
    for role, name in models.items():
        print_head(f"{role}: {name}", out)
    gain = "" if found.total.direct is None else ", gain = direct − target"
    out.print(Text(f"\nΔ = finetuned − base, shift = target − base{gain}", "dim"))
    print_facts([*_counts(found), *_facts(found.total)], out)
    if found.kinds:
        out.print(Text("\nby kind of module", "bold"))
        out.print(_kinds(found.kinds))
        for name, meaning in _MEANINGS:
            if name != _GAIN or found.total.direct is not None:
                out.print(Text(f"{name}: {meaning}", "dim"))
    out.print(Text("\nlayers that stand out", "bold"))
    for line in _standouts(found.standouts):
        out.print(folded(line))


def _counts(found: Distances) -> Iterator[tuple[str, str]]:
    total = found.total
    paired = f"; {_PAIRED[found.vocabulary]}" if found.vocabulary in _PAIRED else ""
    yield "compared", f"{total.tensors:,} tensors, {total.parameters:,} parameters{paired}"
    if found.not_measured:
        tensors = sum(group.tensors for group in found.not_measured)
        reasons = [*dict.fromkeys(group.why for group in found.not_measured if group.why)]
        yield "not compared", f"{tensors:,} tensors: {listed(reasons)}"
    for name, rows in found.rows_left_out.items():
        counts = ", ".join(f"{count:,} of {role}" for role, count in rows.items())
        yield "rows left out", f"{counts} in {name}, since not all models have them"


def _facts(total: Figures) -> Iterator[tuple[str, str]]:
    delta, shift = _percent(total.relative_delta), _percent(total.relative_shift)
    yield "‖Δ‖", f"{total.delta_norm:.4g}, {delta} of ‖base‖: how far fine-tuning moved base"
    yield "‖shift‖", f"{total.shift_norm:.4g}, {shift} of ‖base‖: how far target is from base"
    ratio = "–" if total.ratio is None else f"{total.ratio:.3g}"
    yield "ratio", f"{ratio}, ‖shift‖ / ‖Δ‖: the smaller, the better a graft works as a rule"
    cosine = _cosine(total.cosine_base_target)
    yield "base, target", f"cosine {cosine}: 1 if they point the same way, 0 if unrelated"
    cosine, signs = _cosine(total.cosine_delta_shift), _percent(total.sign_agreement)
    meaning = "equal signs where both moved; 0 and 50 % if the two trainings have nothing in common"
    yield "Δ, shift", f"cosine {cosine}, {signs} {meaning}"
    ours, theirs = _percent(total.unchanged_finetuned), _percent(total.unchanged_target)
    yield "unchanged", f"{ours} of base's elements in finetuned, {theirs} in target"
    if total.direct is not None:
        yield from _gain_facts(total.direct)


def _gain_facts(gain: GainFigures) -> Iterator[tuple[str, str]]:
    unchanged = f"{_percent(gain.unchanged)} of target's elements unchanged"
    yield "‖gain‖", f"{gain.gain_norm:.4g}, {unchanged}: how far fine-tuning moved target"
    cosine, signs = _cosine(gain.cosine_delta_gain), _percent(gain.sign_agreement)
    meaning = "equal signs: how alike fine-tuning was on base and on target"
    yield "Δ, gain", f"cosine {cosine}, {signs} {meaning}"


_GAIN = "cos Δ,g"
_MEANINGS = (
    ("ratio", "‖shift‖ / ‖Δ‖"),
    ("Δ %, shift %", "‖Δ‖ and ‖shift‖ in % of ‖base‖"),
    ("cos b,t", "cosine of base and target"),
    ("cos Δ,s", "cosine of Δ and the shift"),
    ("signs", "of the elements that Δ and the shift both move, % moved the same way"),
    (_GAIN, "cosine of Δ and the gain"),
)


def _kinds(cells: Sequence[Cell]) -> Table:
    table = make_table()
    add_columns(table, "kind")
    heads = ["ratio", "Δ %", "shift %", "cos b,t", "cos Δ,s", "signs"]
    direct = any(cell.figures.direct is not None for cell in cells)
    add_columns(table, *heads, *([_GAIN] if direct else []), numbers=True, no_wrap=True)
    largest = sorted(cells, key=lambda cell: -cell.figures.parameters)[:_KINDS]
    for cell in cells:
        if cell not in largest:
            continue
        found = cell.figures
        row = [
            "–" if found.ratio is None else f"{found.ratio:.3g}",
            _bare(found.relative_delta),
            _bare(found.relative_shift),
            _cosine(found.cosine_base_target),
            _cosine(found.cosine_delta_shift),
            _bare(found.sign_agreement),
        ]
        if direct:
            gain = found.direct
            row.append("–" if gain is None else _cosine(gain.cosine_delta_gain))
        table.add_row(folded(_name(cell, cells)), *row)
    if len(cells) > _KINDS:
        table.add_row(folded(f"and {len(cells) - _KINDS} more kinds; --json lists them all"))
    return table


def _name(cell: Cell, cells: Sequence[Cell]) -> str:
    """A kind of module, with its stack where the name alone says too little."""
    stacks = {each.stack for each in cells if each.kind == cell.kind}
    if len(stacks) == 1:
        return f"{cell.kind}"
    return f"{cell.stack} {cell.kind}" if cell.stack else f"{cell.kind} outside layers"


def _standouts(found: Sequence[Standout]) -> Iterator[str]:
    if not found:
        yield "none: in every layer the ratio is near the median of its kind of module"
        return
    for each in found[:_STANDOUTS]:
        usual = f"the median of its kind is {each.median:.3g}"
        if math.isinf(each.ratio):
            yield f"{each.cell.name}: fine-tuning did not change it; {usual}"
            continue
        factor = "" if math.isinf(each.factor) else f", {each.factor:.2g} times as much"
        more = "more" if each.ratio > each.median else "less"
        moved = f"target moved {more} for its Δ, ratio {each.ratio:.3g}{factor}"
        yield f"{each.cell.name}: {moved}; {usual}"
    if len(found) > _STANDOUTS:
        yield f"and {len(found) - _STANDOUTS} more; --json lists them all"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{percent(share)} %"


def _bare(share: float | None) -> str:
    return "–" if share is None else percent(share)


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
