"""The report of a probe as a page with tables and figures.

The page is meant to be shared, so it names models by their role and has no local paths.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.atomic_write import write_atomically
from diffxfer.checkpoints.writer import write_error
from diffxfer.pages.local_paths import without_folders
from diffxfer.pages.page import Cell, Page
from diffxfer.probing.probe_figures import (
    alpha_figure,
    distance_figure,
    forecast_figure,
    head_figure,
    hidden_figure,
    path_figure,
)
from diffxfer.probing.probe_text import MEANINGS, path_name, record_line, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diffxfer.probing.report import ProbeReport
    from diffxfer.probing.standouts import Standout

PAGE, DATA = "probe.html", "probe.json"


def write_probe(report: ProbeReport, folder: Path) -> None:
    """Write the page and the data of a probe.

    Args:
        report: what was measured.
        folder: the folder, which is made if it is not there.

    Raises:
        OutputError: if they cannot be written.
    """
    data = json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DATA, f"{data}\n".encode())
    except OSError as exc:
        raise write_error(folder, DATA, exc) from exc
    make_page(report).write(folder / PAGE)


def make_page(report: ProbeReport) -> Page:
    """Build the page.

    Args:
        report: what was measured.
    """
    page = Page("Will the graft work?")
    page.verdict(summarize(report))
    page.facts((role, _name(name)) for role, name in report.models.items())
    _add_forecast(page, report)
    _add_alphas(page, report)
    _add_paths(page, report)
    _add_attention(page, report)
    _add_hidden(page, report)
    _add_agreement(page, report)
    _add_distances(page, report)
    if report.warnings:
        page.heading("Warnings")
        page.bullets(without_folders(text, Path(), None) for text in report.warnings)
    return page


def _name(name: str) -> str:
    """A model's name without its folders; an id of the Hub whole."""
    return Path(name).name if Path(name).exists() else name


def _add_forecast(page: Page, report: ProbeReport) -> None:
    found = report.forecast
    if found is None:
        return
    page.heading("Forecast")
    page.figure(forecast_figure(found))
    page.explain(MEANINGS["forecast"])
    page.paragraph(record_line(found))
    if report.activations is not None:
        covered = report.activations.covered
        page.paragraph(
            f"Base read {report.activations.tokens:,} tokens; the layers measured hold"
            f" {covered:.0%} of the weights that are no embedding."
        )


def _add_alphas(page: Page, report: ProbeReport) -> None:
    points = report.alphas
    if not points:
        return
    page.heading("The graft, measured")
    heads = ["model", *_measures(points)]
    rows = []
    for point in points:
        name = point.model if point.alpha is None else f"graft, alpha {point.alpha:g}"
        loss = [] if point.loss is None else [_cell(point.loss, point.loss_stderr)]
        accuracy = [] if point.accuracy is None else [Cell(f"{point.accuracy:.1%}")]
        scores = [_cell(score["value"], score["stderr"]) for score in point.scores]
        rows.append([Cell(name), *loss, *accuracy, *scores])
    page.table(heads, rows, "± standard error")
    figure = alpha_figure(points)
    if figure is not None:
        page.figure(figure)
    page.explain(MEANINGS["alphas"])


def _measures(points: Sequence[object]) -> Iterator[str]:
    first = points[0]
    if getattr(first, "loss", None) is not None:
        yield "loss per token, nats"
        yield "tokens predicted right"
    for score in getattr(first, "scores", ()):
        yield f"{score['task']}: {score['metric']}"


def _cell(value: float | None, stderr: float | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell(f"{value:.4f}", "" if stderr is None else f" ± {stderr:.4f}")


def _add_paths(page: Page, report: ProbeReport) -> None:
    paths = report.paths or ()
    measured = [path for path in paths if hasattr(path, "points")]
    if not paths:
        return
    page.heading("Connectivity: the loss between two models")
    if measured:
        page.figure(path_figure(measured))
    rows = []
    for path in measured:
        name = path_name(path)
        between = path.interval
        interval = "" if between is None else f"{between[0]:.3f} to {between[1]:.3f}"
        ends = f"{path.points[0].loss:.3f}, {path.points[-1].loss:.3f}"
        rows.append([Cell(name), Cell(f"{path.barrier:.3f}"), Cell(interval), Cell(ends)])
    if rows:
        heads = ("path", "barrier, nats", "95 % interval over rows", "loss of the ends")
        page.table(heads, rows, f"{measured[0].rows:,} rows, {measured[0].tokens:,} tokens")
    page.explain(MEANINGS["paths"])
    skipped = [path for path in paths if not hasattr(path, "points")]
    notes = [f"{p.ends[0]} to {p.ends[1]} is left out: {p.reason}" for p in skipped]
    page_notes = [*notes, *(path.note for path in measured if path.note)]
    if page_notes:
        page.bullets(dict.fromkeys(page_notes))


def _add_attention(page: Page, report: ProbeReport) -> None:
    found = report.attention or ()
    shown = [pair for pair in found if pair.cosine is not None]
    if not found:
        return
    page.heading("Attention of corresponding heads")
    rows = []
    for pair in shown:
        said = pair.cosine.as_json()
        cells = [said["mean"], said["other_heads"], said.get("uniform"), said.get("permuted")]
        rows.append([Cell(" and ".join(pair.pair)), *(_plain(value) for value in cells)])
    heads = ("cosine", "corresponding heads", "other heads", "equal attention", "permuted copy")
    if rows:
        page.table(heads, rows, f"{shown[0].tokens:,} tokens in {shown[0].rows:,} rows")
    for pair in shown:
        page.paragraph(f"{pair.pair[0]} and {pair.pair[1]}, by layer and head:")
        page.figure(head_figure(pair))
    page.explain(MEANINGS["attention"])
    _add_reasons(page, [pair for pair in found if pair.cosine is None])


def _plain(value: float | None) -> Cell:
    return Cell("" if value is None or not math.isfinite(value) else f"{value:.3f}")


def _add_reasons(page: Page, pairs: Sequence[object]) -> None:
    lines = [
        f"{' and '.join(getattr(pair, 'pair', ()))}: not compared, since {reason}"
        for pair in pairs
        if (reason := getattr(pair, "reason", None))
    ]
    if lines:
        page.bullets(lines)


def _add_hidden(page: Page, report: ProbeReport) -> None:
    found = report.hidden or ()
    shown = [pair for pair in found if pair.mean is not None]
    if not found:
        return
    page.heading("Hidden states")
    if shown:
        page.figure(hidden_figure(shown))
    page.explain(MEANINGS["hidden"])
    _add_reasons(page, [pair for pair in found if pair.mean is None])


def _add_agreement(page: Page, report: ProbeReport) -> None:
    found = report.agreement or ()
    if not found:
        return
    page.heading("Agreement of predictions")
    rows = []
    for pair in found:
        for share in (pair.first_token, pair.next_token, pair.masked_token, pair.label):
            if share is not None:
                low, high = share.interval
                rows.append(
                    [
                        Cell(" and ".join(pair.pair), f" {share.what}"),
                        Cell(f"{share.share:.1%}"),
                        Cell(f"{low:.1%} to {high:.1%}"),
                        Cell(f"{share.equal:,} of {share.counted:,}"),
                    ]
                )
    if rows:
        page.table(("models", "agree", "95 % interval", "counted"), rows, "")
    page.explain(MEANINGS["agreement"])
    _add_reasons(page, [pair for pair in found if pair.reason])


def _add_distances(page: Page, report: ProbeReport) -> None:
    found = report.distances
    total = found.total
    page.heading("Distances of weights")
    facts = [
        ("‖target − base‖ / ‖Δ‖", _ratio(total.shift_norm, total.delta_norm)),
        ("‖target − base‖ / ‖base‖", _ratio(total.shift_norm, total.base_norm)),
        ("‖Δ‖ / ‖base‖", _ratio(total.delta_norm, total.base_norm)),
        ("cosine of base and target", _number(total.cosine_base_target)),
        ("cosine of Δ and target − base", _number(total.cosine_delta_shift)),
    ]
    page.facts(facts)
    figure = distance_figure(found.cells)
    if figure is not None:
        page.figure(figure)
    page.explain(MEANINGS["distances"])
    if found.standouts:
        page.paragraph("Layers that stand out:")
        page.bullets(_standout(each) for each in found.standouts)


def _standout(found: Standout) -> str:
    """A place whose ratio is unlike that of its kind, in words."""
    place = f"{found.cell.stack}.{found.cell.layer} {found.cell.kind}"
    return f"{place}: ratio {found.ratio:.3g}, where its kind has {found.median:.3g} (median)"


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.4g}" if other else "not defined"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"
