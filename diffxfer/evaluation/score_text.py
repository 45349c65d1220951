"""Names and numbers of an evaluation as text, for a terminal and for a page."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import TYPE_CHECKING

from diffxfer.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffxfer.evaluation.scores import Row


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Short names of models: as many last parts of their paths as needed to be unique.

    Args:
        models: paths or names, in any order.

    Returns:
        A printable name for each; the names are unique if the printable paths are.
    """
    parts = {model: PurePath(model).parts for model in models}
    names = {}
    for model, own in parts.items():
        ends = (own[-count:] for count in range(1, len(own)))
        alone = (
            end for end in ends if sum(end == each[-len(end) :] for each in parts.values()) == 1
        )
        names[model] = printable("/".join(next(alone, (model,))))
    return names


def best_value(rows: Sequence[Row]) -> float | None:
    """The best value; None if that is not meaningful.

    Args:
        rows: the scores of several models by one metric.
    """
    values = [row.value for row in rows if not math.isnan(row.value)]
    if len(rows) < 2 or not values or rows[0].higher_is_better is None:
        return None
    choose: Callable[[Sequence[float]], float] = max if rows[0].higher_is_better else min
    return choose(values)


def number_text(value: float, sign: str = "") -> str:
    """Four decimals, as in lm-eval; a large perplexity gets another format.

    Args:
        value: a score or a difference.
        sign: ``"+"`` to show the sign of a positive one.
    """
    return f"{value:{sign}.4f}" if abs(value) < 1e6 else f"{value:{sign}.4g}"


def chance_text(p_value: float) -> str:
    """A p-value.

    Args:
        p_value: of a test.
    """
    return "p<0.001" if p_value < 0.001 else f"p={p_value:.2g}"


def share_text(recovered: float, interval: tuple[float, float] | None) -> str:
    """A recovered share of the gain of direct fine-tuning.

    Args:
        recovered: the share.
        interval: its 95 % interval, if there is one.
    """
    if recovered < 0:
        return "worse than the target"  # a negative share of the gain would mean nothing
    found = f"recovers {100 * recovered:.0f} %"
    if interval is None:
        return found
    return f"{found} [{', '.join(f'{100 * end:.0f}' for end in interval)}]"
