"""Only the scores of the published model are written to its card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer.errors import EvaluationError
from diffxfer.evaluation.scores import TaskScore
from diffxfer.publishing.published_scores import read_published_scores

if TYPE_CHECKING:
    from pathlib import Path


def row(task: str, content: str | None, **more: Any) -> dict[str, Any]:
    plain = {"metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1, "n": 9}
    return {"task": task, "content": content, "model": "/home/me/secret", **plain, **more}


def scores(folder: Path, *rows: dict[str, Any]) -> Path:
    columns = [["mmlu", "acc", "none"], ["gsm8k", "acc", "none"]]
    (folder / "comparison.json").write_text(json.dumps({"rows": rows, "columns": columns}))
    return folder


def test_this_models_scores_on_what_was_asked(tmp_path: Path) -> None:
    folder = scores(
        tmp_path,
        row("gsm8k", "other", value=0.9),
        row("gsm8k", "ours"),
        row("mmlu_law", "ours"),
        row("mmlu", "ours", value=0.7, stderr=None),
    )
    assert read_published_scores(folder, "ours") == (
        TaskScore("mmlu", "acc", "none", 0.7, None, 9),
        TaskScore("gsm8k", "acc", "none", 0.5, 0.1, 9),
    )


@pytest.mark.parametrize("content", ["other", None])
def test_another_models_scores(tmp_path: Path, content: str | None) -> None:
    with pytest.raises(EvaluationError, match="no score of this model"):
        read_published_scores(scores(tmp_path, row("gsm8k", content)), "ours")


def test_no_scores(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"has no comparison\.json"):
        read_published_scores(tmp_path, "ours")
    with pytest.raises(EvaluationError, match=r"has no comparison\.json"):
        read_published_scores(tmp_path / "none", "ours")
    (tmp_path / "comparison.json").write_text('{"rows": 5}')
    with pytest.raises(EvaluationError, match="not what diffxfer eval writes"):
        read_published_scores(tmp_path, "ours")
