"""The figures of a probe's page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diffxfer.pages.charts import PALETTE, Curve, curves, heat_map
from diffxfer.probing.probe_text import path_name, plain_ends

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plotly.graph_objects import Figure

    from diffxfer.probing.attention import AttentionComparison
    from diffxfer.probing.figures import Cell
    from diffxfer.probing.forecast import Forecast
    from diffxfer.probing.hidden import HiddenComparison
    from diffxfer.probing.paths import MeasuredPath
    from diffxfer.probing.scoring import ScoredPoint


def forecast_figure(found: Forecast) -> Figure:
    """Plot the range of the forecast over the ranges at other distances.

    Args:
        found: the forecast.
    """
    from diffxfer.probing.forecast_rule import RULES

    knots = RULES[found.basis].knots
    ratios = [knot.ratio for knot in knots]
    drawn = [
        Curve(
            "grafts in the record",
            ratios,
            [knot.expected for knot in knots],
            colour=PALETTE[0],
            low=[knot.low for knot in knots],
            high=[knot.high for knot in knots],
        )
    ]
    if math.isfinite(found.ratio):
        here = Curve(
            "these models",
            [found.ratio],
            [found.expected],
            "points",
            PALETTE[1],
            low=[found.low],
            high=[found.high],
        )
        drawn.append(here)
    of = (
        "‖(T − B)x‖ / ‖Bx‖ of linear layers"
        if found.basis == "activations"
        else ("‖target − base‖ / ‖Δ‖")
    )
    return curves(drawn, x=f"distance: {of}", y="recovered, % of direct's gain")


def alpha_figure(points: Sequence[ScoredPoint]) -> Figure | None:
    """Plot the first score, or the loss, against alpha; None for fewer than two alphas.

    Args:
        points: the scored models.
    """
    grafts = sorted((p for p in points if p.alpha is not None), key=lambda p: p.alpha or 0.0)
    if len(grafts) < 2:
        return None
    alphas = [point.alpha or 0.0 for point in grafts]
    drawn = []
    for number, name in enumerate(("target", "direct")):
        found = [_measure(point) for point in points if point.model == name]
        if found and found[0][0] is not None:
            ends = [min(alphas), max(alphas)]
            drawn.append(Curve(name, ends, [found[0][0]] * 2, "dashed", PALETTE[4 - 2 * number]))
    measured = [_measure(point) for point in grafts]
    drawn.append(
        Curve(
            "graft",
            alphas,
            [value for value, _ in measured],
            colour=PALETTE[1],
            low=[_less(value, error, -1) for value, error in measured],
            high=[_less(value, error, 1) for value, error in measured],
        )
    )
    return curves(drawn, x="alpha", y=_measure_name(grafts[0]))


def _measure(point: ScoredPoint) -> tuple[float | None, float | None]:
    if point.scores:
        return point.scores[0]["value"], point.scores[0]["stderr"]
    return point.loss, point.loss_stderr


def _measure_name(point: ScoredPoint) -> str:
    if point.scores:
        return f"{point.scores[0]['task']}: {point.scores[0]['metric']}"
    return "loss per token, nats"


def _less(value: float | None, error: float | None, sign: int) -> float | None:
    return None if value is None or error is None else value + sign * 1.96 * error


def path_figure(paths: Sequence[MeasuredPath]) -> Figure:
    """Plot the loss along paths; controls are dashed.

    Args:
        paths: the measured paths.
    """
    pairs = list(dict.fromkeys(plain_ends(path) for path in paths))
    drawn = [
        Curve(
            path_name(path),
            [point.t for point in path.points],
            [point.loss for point in path.points],
            "dashed" if path.control else "line",
            PALETTE[pairs.index(plain_ends(path)) % len(PALETTE)],
        )
        for path in paths
    ]
    return curves(drawn, x="share of the second model", y="loss per token, nats")


def head_figure(pair: AttentionComparison) -> Figure:
    """Draw the cosine of corresponding heads, by layer and head.

    Args:
        pair: the comparison of two models, with figures.
    """
    assert pair.cosine is not None
    layers = pair.cosine.layers
    heads = max(map(len, layers))
    values = [[*layer, *[None] * (heads - len(layer))] for layer in layers]
    return heat_map(
        values,
        rows=[str(layer) for layer in pair.sampled_layers],
        columns=[str(head) for head in range(heads)],
        meaning="cosine of the attention of corresponding heads",
        x="head",
        y="layer",
        low=0.0,
        high=1.0,
    )


def hidden_figure(pairs: Sequence[HiddenComparison]) -> Figure:
    """Plot CKA by layer; the baseline of other tokens is dashed.

    Args:
        pairs: the comparisons, with figures.
    """
    drawn = []
    for number, pair in enumerate(pairs):
        colour = PALETTE[number % len(PALETTE)]
        name = " and ".join(pair.pair)
        drawn.append(Curve(name, pair.sampled_layers, pair.layers, colour=colour))
        if pair.other_tokens_by_layer:
            other = f"{name}, other tokens"
            layers = pair.other_tokens_by_layer
            drawn.append(Curve(other, pair.sampled_layers, layers, "dashed", colour))
    return curves(drawn, x="layer (0 is the embedding)", y="linear CKA")


def distance_figure(cells: Sequence[Cell]) -> Figure | None:
    """Draw ‖target − base‖ / ‖Δ‖ by layer and kind of module; None without layers.

    Args:
        cells: the figures by place.
    """
    inside = [cell for cell in cells if cell.layer is not None and cell.layer >= 0]
    if not inside:
        return None
    several = len({cell.stack for cell in inside}) > 1
    rows = list(dict.fromkeys((cell.stack, cell.layer) for cell in inside))
    kinds = list(dict.fromkeys(cell.kind or "" for cell in inside))
    table: dict[Any, float | None] = {
        ((cell.stack, cell.layer), cell.kind or ""): cell.figures.ratio for cell in inside
    }
    return heat_map(
        [[table.get((row, kind)) for kind in kinds] for row in rows],
        rows=[f"{stack} {layer}" if several else str(layer) for stack, layer in rows],
        columns=kinds,
        meaning="‖target − base‖ / ‖Δ‖: the smaller, the better a graft fits",
        x="kind of module",
        y="layer",
    )
