"""The summary at the top of a chain's page claims no more than the scores support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffxfer.recycling.chain_report import ChainReport, Round
from diffxfer.recycling.chain_summary import summarize

MEASURE = ("words", "acc", "none")


def row(value: float | None, **more: Any) -> dict[str, Any]:
    known = {"task": "words", "metric": "acc", "filter": "none", "value": value, "stderr": None}
    known |= {"n": 8, "higher_is_better": True, "baseline": "base", "p_value": 0.001}
    return {**known, "recovered": None, "recovered_interval": None, "notes": [], **more}


def said(**columns: dict[str, Any]) -> list[str]:
    scores = {column: [found] for column, found in columns.items()}
    rounds = (Round(1, "old", None, {}, {}), Round(2, "new", 0.8, scores, {}))
    return summarize(ChainReport(Path("/run"), rounds, (MEASURE,), {}, (), 1, 1.0))


def test_a_gain_is_told_as_a_share_of_plain_tunings() -> None:
    graft = row(0.8, recovered=0.75, recovered_interval=[0.5, 0.9])
    assert said(base=row(0.2), graft=graft, direct=row(1.0)) == [
        "Recovered 75 % of plain tuning's gain on words (acc): the graft on new at alpha 0.8 scores"
        " 0.8000, the base alone 0.2000, the base tuned plainly 1.0000; a gain of 0.6000"
        " (p = 0.001); 95 % interval 50 to 90 %."
    ]


@pytest.mark.parametrize(
    ("graft", "others", "outcome", "remark"),
    [
        (row(0.1), {"base": row(0.2)}, "Not recovered on", "0.1000 worse than the base"),
        (row(0.2), {"base": row(0.2)}, "Not recovered on", "no better than the base"),
        (row(0.3, p_value=0.4), {"base": row(0.2)}, "Not shown to help on", "may be chance"),
        (row(0.3), {"base": row(0.2)}, "Better than the base on", "controls has no direct"),
        (row(0.3), {"direct": row(0.4)}, "Not known whether it helped on", "was not scored"),
        (row(None), {"base": row(0.2)}, "Not known whether it helped on", "scores nan"),
        (
            row(0.3, notes=["direct gains nothing"]),
            {"base": row(0.2), "direct": row(0.4)},
            *("Better than the base on", "no share of plain tuning's gain: direct gains nothing"),
        ),
        (
            row(0.3),
            {"base": row(0.2), "direct": row(0.2)},
            *("Better than the base on", "plain tuning gains nothing over the base"),
        ),
        (
            row(0.3, higher_is_better=False),
            {"base": row(0.2, higher_is_better=False)},
            *("Not recovered on", "0.1000 worse"),
        ),
        (
            row(0.3, higher_is_better=None),
            {"base": row(0.2)},
            *("Not known whether it helped on", "whether higher is better"),
        ),
    ],
)
def test_no_more_is_claimed_than_was_found(
    graft: dict[str, Any], others: dict[str, dict[str, Any]], outcome: str, remark: str
) -> None:
    [sentence] = said(graft=graft, **others)
    assert sentence.startswith(f"{outcome} words (acc): the graft on new at alpha 0.8 scores ")
    assert remark in sentence


def test_a_test_against_another_model_is_not_taken_for_one_against_the_base() -> None:
    [sentence] = said(base=row(0.2), graft=row(0.3, baseline="graft", p_value=0.9))
    assert "chance" not in sentence
    assert "p =" not in sentence


def test_what_was_tuned_further_has_a_line_of_its_own() -> None:
    made = "on words (acc): the graft that was tuned further scores"
    first, second = said(base=row(0.2), graft=row(0.1), tuned=row(0.9))
    assert first.startswith("Not recovered on words (acc): the graft on new at alpha 0.8 scores")
    assert second.startswith(f"Better than the base {made} 0.9000, the base alone 0.2000; ")
    first, second = said(base=row(0.2), graft=row(0.3), tuned=row(0.1))
    assert first.startswith("Better than the base on")
    assert second.startswith(f"No better than the base {made} 0.1000, ")


def test_without_scores_nothing_is_claimed() -> None:
    assert said() == [
        "Nothing was scored, since the recipe has no eval part: it is not known whether the"
        " fine-tuning carried over."
    ]
