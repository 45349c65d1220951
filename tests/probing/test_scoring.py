"""Scores of models in memory are those of `eval`, and the best alpha is chosen by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from diffxfer import evaluate, extract_diff
from diffxfer.family import family_folder
from diffxfer.models.graft import transfer_source
from diffxfer.probing.compare_functions import Runtime
from diffxfer.probing.probe_options import check_probe_options
from diffxfer.probing.scoring import ScoredPoint, best_alpha, make_score, score_point

if TYPE_CHECKING:
    from pathlib import Path

FAMILY = family_folder()
TASKS: dict[str, Any] = {
    "tasks": "pig_latin,pig_latin_choice,docstrings",
    "include_path": FAMILY / "tasks",
    "limit": 4,
    "batch_size": 4,
    "device": "cpu",
}


def options(**changes: Any) -> Any:
    none = dict.fromkeys(("data", "tasks", "include_path", "limit", "device", "output"))
    given: dict[str, Any] = {"alpha": 1.0, "points": 11, "forward": False, "rows": 200}
    given |= {"batch_size": 16, "seed": 0, "stream": False}
    return check_probe_options(**{**none, **given, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_scores_are_those_of_eval(dtype: torch.dtype | None, tmp_path: Path) -> None:
    # By default a diff vector is rounded to bfloat16, and the graft of three models is not.
    extract_diff(FAMILY / "finetuned", FAMILY / "base", tmp_path / "diff", diff_dtype="float32")
    name = "auto" if dtype is None else "float32"
    found = evaluate(
        FAMILY / "target", diff=tmp_path / "diff", alpha=(0.5, 1.0), dtype=name, **TASKS
    )
    score = make_score(options(**TASKS, seed=7).settings)
    runtime = Runtime("cpu", dtype, 4, 7)
    values = {}
    for alpha in (0.5, 1.0):
        with transfer_source(
            *(FAMILY / r for r in ("finetuned", "base", "target")), alpha
        ) as graft:
            point = score_point(graft, alpha, None, score, runtime)
        assert (point.loss, point.accuracy) == (None, None)
        values |= {
            (alpha, each["task"], each["metric"]): (each["value"], each["stderr"], each["n"])
            for each in point.scores
        }
    expected = {
        (row.alpha, row.task, row.metric): (row.value, row.stderr, row.n)
        for row in found.rows
        if row.alpha is not None
    }
    assert values == expected
    assert len(values) >= 6


def point(alpha: float | None, loss: float | None, *scores: Any) -> ScoredPoint:
    named = [{"value": value, "higher_is_better": higher} for value, higher in scores]
    return ScoredPoint("graft", alpha, loss, None, None, named)


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([], None),
        ([point(None, 0.0)], None),
        ([point(0.5, 2.0), point(1.0, 1.0), point(None, 0.0)], 1.0),
        ([point(0.5, 1.0, (0.2, True)), point(1.0, 2.0, (0.4, True))], 1.0),
        ([point(0.5, 1.0, (0.2, False)), point(1.0, 1.0, (0.4, False))], 0.5),
        ([point(0.5, 1.0, (0.2, None)), point(1.0, 1.0, (0.4, None))], 1.0),
        ([point(0.5, 1.0), point(1.2, 1.0)], 1.2),
        ([point(0.5, float("nan")), point(2.0, 5.0)], 2.0),
        ([point(0.5, None), point(2.0, None)], 0.5),
    ],
)
def test_the_best_alpha(points: list[ScoredPoint], best: float | None) -> None:
    assert best_alpha(points) == best


def test_json_has_no_infinity() -> None:
    found = ScoredPoint("graft", 1.0, float("inf"), float("nan"), 0.5, []).as_json()
    assert (found["loss"], found["loss_stderr"], found["accuracy"]) == (None, None, 0.5)
