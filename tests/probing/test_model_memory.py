"""The memory for models is known before they are loaded, and too little of it is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from diffxfer.errors import EvaluationError
from diffxfer.family import family_folder
from diffxfer.models.checkpoint import open_plain
from diffxfer.probing import model_memory
from diffxfer.probing.model_memory import free_memory_on, plan_memory

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = open_plain(family_folder() / "target").tensors
PARAMETERS = 821_120


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(model_memory, "free_memory_on", lambda _: count)


def test_float32_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = PARAMETERS * 4 * 5 // 2
    free(monkeypatch, needed)
    plan = plan_memory([TENSORS, {}], "cpu")
    assert (plan.needed, plan.dtype, plan.parameters) == (needed, torch.float32, PARAMETERS)
    said = "models in float32 on cpu: up to 8.21 MB of memory; 8.21 MB are free"
    assert plan.sentence("cpu") == said


def test_the_dtype_of_the_weights_where_float32_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free(monkeypatch, PARAMETERS * 4 * 5 // 2 - 1)
    plan = plan_memory([TENSORS], "cpu")
    assert (plan.needed, plan.dtype) == (PARAMETERS * 2 * 5 // 2, None)
    assert plan.sentence("cpu").startswith("models in the weights' dtype on cpu: up to 4.11 MB")


def test_models_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, PARAMETERS * 2 * 5 // 2 - 1)
    with pytest.raises(EvaluationError) as caught:
        plan_memory([TENSORS], "cpu")
    assert str(caught.value) == (
        "probe: two models and a half need 4.11 MB of memory on cpu, and 4.11 MB are free; leave"
        " out --data, --tasks and --forward, since distances load no model"
    )


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "5", None), ("4096", "1000", 3096), ("4096", "5000", 0), (str(1 << 60), "0", None)],
)
def test_a_container_may_have_less(
    limit: str, used: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(model_memory, "_CGROUP", tmp_path)
    total = psutil.virtual_memory().total
    found = free_memory_on("cpu")
    assert 0 < found <= total if expected is None else found == expected


def test_without_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_memory, "_CGROUP", tmp_path / "none")
    assert 0 < free_memory_on("cpu") <= psutil.virtual_memory().total
