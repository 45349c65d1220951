"""The scores as tables in Markdown: means over seeds with their standard error, and differences."""

from collections.abc import Mapping, Sequence
from math import nan
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

Row = Mapping[str, Any]

ARMS = {
    "graft": "graft, untuned",
    "direct": "plain",
    "initialised": "initialised",
    "distilled": "distilled",
    "tuned": "both",
}
PLAIN = "direct"
_SIGNIFICANT = 0.05


def tables(rows: Sequence[Row]) -> str:
    """Return all tables: scores, and differences from plain tuning.

    Args:
        rows: the scores, each with its run, seed and steps.
    """
    settings = list(dict.fromkeys((row["run"], row["steps"], row["base"]) for row in rows))
    outdated = _score([r for r in rows if (r["run"], r["round"]) == ("all-m2", 1)])
    arms = [setting for setting in settings if _of(rows, setting, PLAIN)]
    heads = "| rows, bases, steps |"
    scores = [f"{heads} {' | '.join(ARMS.values())} |", "|---" * (len(ARMS) + 1) + "|"]
    others = [arm for arm in ARMS if arm != PLAIN]
    said = [*(f"{ARMS[arm]} − plain" for arm in others), "both − initialised"]
    gains = [f"{heads} {' | '.join(said)} |", "|---" * (len(said) + 1) + "|"]
    for setting in arms:
        found = {arm: _of(rows, setting, arm) for arm in ARMS}
        scores.append(_line(setting, [_score(each) for each in found.values()]))
        cells = [f"{_gain(found[arm], found[PLAIN])} ({_clear(found[arm])})" for arm in others]
        gains.append(_line(setting, [*cells, _gain(found["tuned"], found["initialised"])]))
    return "\n".join([f"outdated classifier on `m1`: {outdated}", "", *scores, "", *gains])


def _of(rows: Sequence[Row], setting: tuple[str, int, str], stage: str) -> list[Row]:
    """The rows of a setting and stage, by seed."""
    found = [
        row
        for row in rows
        if (row["run"], row["steps"], row["base"], row["stage"]) == (*setting, stage)
    ]
    return sorted(found, key=lambda row: row["seed"])


def _line(setting: tuple[str, int, str], cells: Sequence[str]) -> str:
    run, steps, base = setting
    count, kind, *_ = run.split("-")
    path = f"round by round to `{base}`" if kind == "chain" else f"`m1` → `{base}`"
    return f"| {count}, {path}, {steps} | {' | '.join(cells)} |"


def _score(found: Sequence[Row]) -> str:
    values = [100 * row["value"] for row in found]
    return f"{mean(values):.1f} ± {_error(values):.1f}" if values else ""


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean over seeds: tunings differ more than samples of questions."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _gain(found: Sequence[Row], others: Sequence[Row]) -> str:
    """The mean difference, and its 95 % interval over seeds."""
    gains = [100 * (a["value"] - b["value"]) for a, b in zip(found, others, strict=True)]
    reach = float(t.ppf(0.975, len(gains) - 1)) * _error(gains) if len(gains) > 1 else nan
    return f"{mean(gains):+.1f} ± {reach:.1f}"


def _clear(found: Sequence[Row]) -> str:
    """In how many seeds the paired test of the answers finds a difference from plain tuning."""
    clear = sum(row["p_value"] is not None and row["p_value"] < _SIGNIFICANT for row in found)
    return f"{clear} of {len(found)}"
