"""A job's fingerprint depends on all that can change its result, and on nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from diffxfer.diffs.jobs import fingerprint as module
from diffxfer.diffs.jobs.fingerprint import fingerprint
from diffxfer.streaming.plan import Operation, RunKind, TensorTask, make_plan, whole
from tests.helpers import read_specs, save_shard

if TYPE_CHECKING:
    from pathlib import Path


def job(folder: Path, **changes: Any) -> str:
    """The fingerprint of a job with one tensor, with some changes."""
    paths = [folder / f"{role}.safetensors" for role in ("diff", "target")]
    if not paths[0].exists():
        for number, path in enumerate(paths):
            save_shard(path, {"a": torch.full((4, 3), float(number))})
    specs = [read_specs(path)["a"] for path in paths]
    task = TensorTask(
        name="a",
        operation=Operation.APPLY,
        inputs=tuple(specs),
        dtype="F32",
        shape=(4, 3),
        runs=whole(RunKind.GRAFT, 2),
        shard="model.safetensors",
    )
    own = {name: changes.pop(name) for name in list(changes) if name not in GIVEN}
    plan = make_plan([replace(task, **own)], [spec.shard for spec in specs])
    given = GIVEN | changes
    return fingerprint(plan, given["files"], given["described"])


GIVEN: dict[str, Any] = {"files": {"config.json": b"{}"}, "described": ("apply",)}


def test_the_same_job_is_the_same(tmp_path: Path) -> None:
    assert job(tmp_path) == job(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"config.json": b"[]"}},
        {"files": {"config.jso": b"{}"}},
        {"described": ("apply", "alpha")},
        {"alpha": 0.5},
        {"operation": Operation.TRANSFER},
        {"dtype": "F64"},
        {"shard": "other.safetensors"},
        {"name": "b"},
        {"sample": (1,)},
        {"runs": whole(RunKind.COPY, 2)},
    ],
    ids=str,
)
def test_another_job_is_another(tmp_path: Path, change: dict[str, Any]) -> None:
    assert job(tmp_path, **change) != job(tmp_path)


@pytest.mark.parametrize("package", ["diffxfer", "torch"])
def test_other_versions_are_other_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    before, version = job(tmp_path), module.version
    newer = {package: "99"}
    monkeypatch.setattr(module, "version", lambda name: newer.get(name) or version(name))
    assert job(tmp_path) != before


def test_an_input_of_another_time_or_inode_is_another(tmp_path: Path) -> None:
    before = job(tmp_path)
    os.utime(tmp_path / "target.safetensors", ns=(0, 0))
    touched = job(tmp_path)
    path = tmp_path / "target.safetensors"
    path.rename(tmp_path / "kept")  # so that its inode is not given again
    path.write_bytes((tmp_path / "kept").read_bytes())
    os.utime(path, ns=(0, 0))
    assert len({before, touched, job(tmp_path)}) == 3


def test_a_companion_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("one")
    before = job(tmp_path, files={"LICENSE": tmp_path / "LICENSE"})
    assert before == job(tmp_path, files={"LICENSE": b"one"})
    (tmp_path / "LICENSE").write_text("two")
    assert before != job(tmp_path, files={"LICENSE": tmp_path / "LICENSE"})
