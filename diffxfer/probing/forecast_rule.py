"""The rule of the forecast: what grafts at some distance recovered, and how well it did elsewhere.

The tables are what ``examples/forecast/run_forecast.py`` printed. They were fixed on families of
tiny models that were trained for it. At each distance a range holds nearly all of the nearest
settings, and was widened until nine in ten settings of a family lay in the range that was made
without that family. The records come from other families, which the rule was fixed without.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Knot:
    """What grafts at one distance recover, in % of direct fine-tuning's gain.

    Attributes:
        ratio: the distance.
        low: the lower end of the range.
        expected: a single figure within it.
        high: the upper end of the range.
    """

    ratio: float
    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True)
class Record:
    """How well forecasts agreed with measurements on families that the rule was fixed without.

    Attributes:
        families: how many families.
        settings: how many settings, each a fine-tune and a target of a family.
        spearman: how well the ratio ranks settings by recovery; 1 is perfect.
        inside: the share of settings whose recovery was within the range, in %.
        mean_error: of the single expected figure, in points.
        mean_width: of the range, in points.
        remark: what the record does not say.
    """

    families: int
    settings: int
    spearman: float
    inside: float
    mean_error: float
    mean_width: float
    remark: str = "Measured on models of up to half a million parameters; larger models may differ."


@dataclass(frozen=True, slots=True)
class Rule:
    """A table from distances to ranges; both ends and the expected figure fall with the distance.

    Attributes:
        knots: by growing ratio.
        families: on how many families it was fixed.
        settings: on how many settings.
        record: how it did on others.
    """

    knots: tuple[Knot, ...]
    families: int
    settings: int
    record: Record


RULES = {
    "activations": Rule(
        knots=(
            Knot(0.02, 94.1, 99.0, 100.0),
            Knot(0.03, 94.1, 99.0, 100.0),
            Knot(0.05, 94.1, 99.0, 100.0),
            Knot(0.07, 93.8, 98.6, 100.0),
            Knot(0.1, 81.4, 94.8, 100.0),
            Knot(0.14, 42.2, 72.0, 98.3),
            Knot(0.2, 39.5, 66.9, 95.4),
            Knot(0.28, 14.2, 43.5, 73.8),
            Knot(0.4, 1.7, 23.2, 49.2),
            Knot(0.56, 0.6, 9.4, 25.4),
            Knot(0.8, 0.0, 3.4, 8.9),
            Knot(1.12, 0.0, 2.6, 7.5),
            Knot(1.4, 0.0, 2.6, 7.5),
        ),
        families=4,
        settings=44,
        record=Record(
            families=2, settings=22, spearman=0.88, inside=90.9, mean_error=5.2, mean_width=25.3
        ),
    ),
    "weights": Rule(
        knots=(
            Knot(0.1, 86.7, 96.9, 100.0),
            Knot(0.14, 86.7, 96.9, 100.0),
            Knot(0.2, 85.4, 96.6, 100.0),
            Knot(0.28, 72.6, 94.0, 100.0),
            Knot(0.4, 61.5, 89.0, 100.0),
            Knot(0.56, 49.4, 80.7, 100.0),
            Knot(0.8, 29.8, 75.5, 100.0),
            Knot(1.1, 23.5, 59.4, 98.3),
            Knot(1.6, 3.7, 29.9, 71.7),
            Knot(2.2, 0.0, 18.9, 47.8),
            Knot(3.2, 0.0, 5.8, 16.3),
            Knot(4.5, 0.0, 3.4, 10.9),
            Knot(6.4, 0.0, 3.4, 10.9),
            Knot(9.0, 0.0, 3.4, 10.9),
        ),
        families=4,
        settings=44,
        record=Record(
            families=2, settings=22, spearman=0.87, inside=95.5, mean_error=7.9, mean_width=39.2
        ),
    ),
}
