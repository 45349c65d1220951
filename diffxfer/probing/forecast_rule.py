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
    remark: str = (
        "Measured on models of up to 250,000 parameters; larger models may differ: a family of "
        "900,000 recovered more than its range."
    )


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
            Knot(0.01, 99.8, 100.0, 100.0),
            Knot(0.05, 46.5, 74.8, 100.0),
            Knot(0.07, 46.5, 74.8, 100.0),
            Knot(0.1, 46.5, 70.9, 100.0),
            Knot(0.14, 9.8, 61.7, 100.0),
            Knot(0.2, 0.0, 20.0, 76.3),
            Knot(0.28, 0.0, 13.8, 48.9),
            Knot(0.4, 0.0, 13.8, 48.9),
            Knot(0.56, 0.0, 7.5, 34.9),
            Knot(0.8, 0.0, 2.6, 12.0),
            Knot(1.12, 0.0, 2.6, 12.0),
            Knot(1.4, 0.0, 2.6, 12.0),
        ),
        families=3,
        settings=39,
        record=Record(
            families=2, settings=26, spearman=0.94, inside=96.2, mean_error=15.0, mean_width=54.0
        ),
    ),
    "weights": Rule(
        knots=(
            Knot(0.02, 99.9, 100.0, 100.0),
            Knot(0.1, 33.2, 68.0, 99.2),
            Knot(0.14, 33.2, 68.0, 99.2),
            Knot(0.2, 9.1, 60.1, 93.5),
            Knot(0.28, 9.1, 57.0, 90.7),
            Knot(0.4, 0.0, 34.4, 90.7),
            Knot(0.56, 0.0, 22.2, 75.1),
            Knot(0.8, 0.0, 21.5, 75.1),
            Knot(1.1, 0.0, 11.7, 48.1),
            Knot(1.6, 0.0, 4.5, 24.0),
            Knot(2.2, 0.0, 4.5, 24.0),
            Knot(3.2, 0.0, 4.5, 24.0),
            Knot(4.5, 0.0, 4.5, 24.0),
            Knot(6.4, 0.0, 4.5, 24.0),
            Knot(9.0, 0.0, 4.5, 24.0),
        ),
        families=3,
        settings=39,
        record=Record(
            families=2, settings=26, spearman=0.79, inside=73.1, mean_error=21.8, mean_width=62.8
        ),
    ),
}
