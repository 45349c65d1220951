"""The plots of a chain."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

from diffxfer.recycling.chain_report import STAGES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from diffxfer.evaluation.scores import MetricKey
    from diffxfer.recycling.chain_report import ChainReport, Round

# One colour per stage, distinguishable by colour-blind readers (after Okabe and Ito 2008) on white
# and on black.
_COLOURS = {
    "base": "#8A8A8A",
    "graft": "#D98E00",
    "tuned": "#2B85C7",
    "direct": "#009E73",
    "initialised": "#CC79A7",
    "distilled": "#C75B12",
}
_DASHES = {"direct": "dot", "initialised": "dash", "distilled": "dashdot"}
STAGE_NAMES = {
    "base": "base alone",
    "graft": "graft",
    "tuned": "graft, tuned",
    "direct": "base, tuned plainly",
    "initialised": "graft, tuned without the teacher",
    "distilled": "base, tuned with the teacher",
}


def scores_figure(report: ChainReport, measure: MetricKey) -> Figure:
    """Plot score against round, with standard errors and one curve per stage.

    Args:
        report: the result of the chain.
        measure: the task, metric and filter.
    """
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for column in STAGES:
        found = [(each, each.row(column, measure)) for each in report.rounds]
        there = [(each, row) for each, row in found if row is not None]
        if there:
            figure.add_trace(
                Scatter(
                    x=[each.number for each, _ in there],
                    y=[row["value"] for _, row in there],
                    error_y={"type": "data", "array": [row["stderr"] or 0 for _, row in there]},
                    mode="lines+markers",
                    name=STAGE_NAMES[column],
                    line={"color": _COLOURS[column]},
                )
            )
    figure.update_xaxes(dtick=1, title="round")
    return figure


def losses_figure(report: ChainReport) -> Figure | None:
    """Plot loss against training step, one curve per round and model; None without training.

    Args:
        report: the result of the chain.
    """
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for place, each in enumerate(report.rounds):
        colour = _shade(place / max(1, len(report.rounds) - 1))
        for name, log in each.losses.items():
            if log:
                figure.add_trace(
                    Scatter(
                        x=[entry["step"] for entry in log],
                        y=[entry["loss"] for entry in log],
                        mode="lines",
                        name=f"{each.number}: {_trained(name, each)}",
                        line={"color": colour, "dash": _DASHES.get(name, "solid")},
                    )
                )
    if not figure.data:
        return None
    figure.update_xaxes(title="step")
    return figure


def _shade(share: float) -> str:
    """A colour from blue through violet to orange, visible on white and on black."""
    hue = (0.58 + 0.49 * share) % 1
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.55, 0.65))
    return f"#{red:02X}{green:02X}{blue:02X}"


def _trained(name: str, each: Round) -> str:
    if name == "model":
        return STAGE_NAMES["direct" if each.alpha is None else "tuned"]
    return STAGE_NAMES[name]
