"""The figure: recovery against the activation ratio, with the range of the forecast behind it."""

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 420, 60, 50, 20, 190
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SMALLEST, LARGEST = 0.01, 2.0


def x_of(ratio: float) -> float:
    """Return where a ratio lies, on a logarithmic axis."""
    share = math.log(ratio / SMALLEST) / math.log(LARGEST / SMALLEST)
    return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)


def y_of(recovery: float) -> float:
    """Return where a recovery lies, between 0 and 100 %."""
    return HEIGHT - BOTTOM - min(max(recovery, 0.0), 100.0) / 100 * (HEIGHT - BOTTOM - TOP)


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    """Return a line of text."""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{more}>{words}</text>'


def axes() -> list[str]:
    """Return the axes with their names."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for share in (0, 25, 50, 75, 100):
        y = y_of(share)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y + 4, f"{share}", "end"))
    for ratio in TICKS:
        parts.append(f'<path d="M{x_of(ratio):.1f} {bottom}v5" stroke="#666"/>')
        parts.append(text(x_of(ratio), bottom + 18, f"{ratio:g}"))
    middle = (LEFT + right) / 2
    parts.append(text(middle, HEIGHT - 10, "activation ratio ‖(T − B)x‖ / ‖Bx‖"))
    turned = f' transform="rotate(-90 16 {(TOP + bottom) / 2:.0f})"'
    parts.append(text(16, (TOP + bottom) / 2, "recovery, % of direct's gain", more=turned))
    return parts


def scatter(rows: Sequence[dict[str, Any]], knots: Sequence[tuple[float, ...]]) -> str:
    """Return an SVG: a dot for each graded setting, filled where the rule was fixed on it.

    Args:
        rows: the settings.
        knots: the rule's ratios, low, expected and high.
    """
    ends = [(SMALLEST, *knots[0][1:]), *knots, (LARGEST, *knots[-1][1:])]
    outline = [(knot[0], knot[3]) for knot in ends] + [(knot[0], knot[1]) for knot in ends[::-1]]
    band = " ".join(f"{x_of(ratio):.1f},{y_of(share):.1f}" for ratio, share in outline)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<polygon points="{band}" fill="#eef2f6"/>',
        *axes(),
    ]
    for number, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
        own = [row for row in rows if row["family"] == family and row["recovery"] is not None]
        colour = COLOURS[number % len(COLOURS)]
        hollow = own and own[0]["held_out"]
        style = f'fill="{"#fff" if hollow else colour}" stroke="{colour}" stroke-width="2"'
        for row in own:
            x, y = x_of(row["activation_ratio"]), y_of(row["recovery"])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {style}/>')
        x, y = WIDTH - RIGHT + 20, TOP + 20 + 24 * number
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" {style}/>')
        parts.append(text(x + 12, y + 4, f"{family}{', held out' if hollow else ''}", "start"))
    return "\n".join([*parts, "</svg>", ""])
