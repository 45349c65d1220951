"""What a run is told in: the measurements, a table, a figure, and the rule as code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from fitting import RATIOS, fit, graded, looked_up, record
from scatter import scatter
from scipy.stats import spearmanr

VARIANTS = {
    "activation_ratio": "‖(T − B)x‖ / ‖Bx‖, mean over linear layers without the head",
    "with_head": "the same, with the head",
    "with_biases": "the same, layers with their biases",
    "median": "the same, median over layers",
    "largest": "the same, largest of the layers",
    "weight_ratio": "‖target − base‖ / ‖Δ‖",
    "relative": "‖target − base‖ / ‖base‖",
}
REAL = ("short", "medium", "long", "code")


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a setting with its figures at five digits."""
    return {
        key: float(f"{value:.5g}") if isinstance(value, float) else value
        for key, value in row.items()
    }


def ranks(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Return how well a number ranks settings by their recovery: 1 is perfect."""
    return -float(spearmanr([row[key] for row in rows], [row["recovery"] for row in rows])[0])


def variants_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of how well each number ranks recovery: within families, pooled, by kind."""
    rows = [row for row in rows if row["recovery"] is not None]
    families = sorted({row["family"] for row in rows})
    real = [row for row in rows if row["target_name"] in REAL]
    held_out = [row for row in rows if row["held_out"]]
    lines = [
        "| number | worst family | mean of families | all families pooled | trained targets "
        "| held-out families |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in VARIANTS.items():
        within = [ranks([row for row in rows if row["family"] == each], key) for each in families]
        figures = (
            min(within),
            sum(within) / len(within),
            *(ranks(some, key) for some in (rows, real, held_out)),
        )
        lines.append(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    return "\n".join(lines)


def span(values: Sequence[float], digits: int) -> str:
    """Return the smallest and the largest value."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}" if values else ""


def families_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line for each fine-tune of each family: settings, distances and recoveries."""
    lines = [
        "| family | held out | task | fine-tune on base | settings | skipped | activations "
        "| weights | recovery |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family, task in dict.fromkeys((row["family"], row["task"]) for row in rows):
        own = [row for row in rows if (row["family"], row["task"]) == (family, task)]
        kept = [row for row in own if row["recovery"] is not None]
        spans = " | ".join(
            span([row[key] for row in kept], digits)
            for key, digits in (("activation_ratio", 2), ("weight_ratio", 2), ("recovery", 0))
        )
        lines.append(
            f"| {family} | {'yes' if own[0]['held_out'] else ''} | {task} "
            f"| {own[0]['finetuned']:.0f} % | {len(kept)} | {len(own) - len(kept)} | {spans} |"
        )
    return "\n".join(lines)


def settings_table(rows: Sequence[dict[str, Any]], knots: Any) -> str:
    """Return a line for each setting, with the range that the activations' rule gives."""
    lines = [
        "| family | task | target | activations | weights | target's score | direct "
        "| graft (alpha) | recovery | forecast |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, _, high = looked_up(knots, [row["activation_ratio"]])[0]
        share = "skipped" if row["recovery"] is None else f"{row['recovery']:.0f} %"
        lines.append(
            f"| {row['family']}{' (held out)' if row['held_out'] else ''} | {row['task']} "
            f"| {row['target_name']} | {row['activation_ratio']:.3f} | {row['weight_ratio']:.2f} "
            f"| {row['target']:.0f} | {row['direct']:.0f} | {row['graft']:.0f} ({row['alpha']}) "
            f"| {share} | {low:.0f} to {high:.0f} |"
        )
    return "\n".join(lines)


def records_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return how each rule does on the families it was fixed on, and on the others."""
    lines = [
        "| forecast from | families | settings | Spearman | inside the range | mean error | "
        "mean width of the range |",
        "|---|---|---|---|---|---|---|",
    ]
    for basis in RATIOS:
        knots = fit(rows, basis)
        for held_out in (False, True):
            found = record(graded(rows, held_out=held_out), basis, knots)
            which = "held out" if held_out else "fixed on"
            lines.append(
                f"| {basis} | {which} ({found['families']}) | {found['settings']} "
                f"| {found['spearman']} | {found['inside']} % | {found['mean_error']} points "
                f"| {found['mean_width']} points |"
            )
    return "\n".join(lines)


def as_code(rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables and records as they stand in `diffxfer/probing/forecast_rule.py`."""
    parts = []
    for basis in RATIOS:
        knots = fit(rows, basis)
        parts.append(f"{basis}:")
        parts.extend(f"    {knot}," for knot in knots)
        parts.append(f"    {record(graded(rows, held_out=True), basis, knots)}")
    return "\n".join(parts)


def write_reports(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Fit the rule, and write the measurements, the tables and the figure into `folder`."""
    rows = [rounded(row) for row in rows]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "measurements.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    knots = np.array(fit(rows, "activations"))
    (folder / "settings.md").write_text(
        f"# The settings\n\n{settings_table(rows, knots)}\n", "utf-8"
    )
    (folder / "scatter.svg").write_text(scatter(rows, fit(rows, "activations")), "utf-8")
    for table in (families_table(rows), variants_table(rows), records_table(rows), as_code(rows)):
        typer.echo(f"\n{table}")
