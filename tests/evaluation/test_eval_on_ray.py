"""Scoring on a real Ray cluster of two nodes: the scores, files and errors of one machine."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer import Evaluation, RayCluster, evaluate
from diffxfer.errors import ClusterError, EvaluationError, OptionError
from diffxfer.evaluation.score_on_cluster import _packed, _request_callback, count_gpus
from tests import tiny
from tests.cluster import nodes
from tests.cluster.here import Here
from tests.evaluation.conftest import FAMILY, QUICK

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("ray")

TARGET, DIRECT = FAMILY / "target", FAMILY / "direct"
HOW: dict[str, Any] = {**QUICK, "tasks": ["pig_latin_choice", "docstrings"], "limit": 6}
OF_A_RUN = {"date", "total_evaluation_time_seconds", "pretty_env_info"}
"""lm-eval's keys that two runs do not share; tests find no versions, but nodes do."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with nodes.cluster({}, {}) as made:
        yield made.address


@pytest.fixture(scope="module")
def cluster(address: str) -> Iterator[RayCluster]:
    with RayCluster(address) as connected:
        yield connected


def compared(found: Evaluation) -> dict[str, Any]:
    return {
        key: value for key, value in found.as_json().items() if key not in ("elapsed_s", "output")
    }


def files(output: Path) -> dict[str, Any]:
    """The content of lm-eval's files, by folder and by name without its time."""
    found = {}
    for path in output.glob("*/*.json*"):
        text = path.read_text()
        values = text.splitlines() if path.suffix == ".jsonl" else [text]
        name = f"{path.parent.name}/{path.name.split('_202')[0]}"
        found[name] = [
            {key: value for key, value in json.loads(one).items() if key not in OF_A_RUN}
            for one in values
        ]
    return found


def test_three_alphas_on_two_nodes(cluster: RayCluster, diff: Path, tmp_path: Path) -> None:
    how = {**HOW, "diff": diff, "alpha": [0.8, 1.0, 1.2], "finetuned": DIRECT}
    outputs = tmp_path / "there", tmp_path / "here"
    bar: list[tuple[str, int, int]] = []
    told: list[str] = []
    there = evaluate(
        TARGET,
        **how,
        output=outputs[0],
        cluster=cluster,
        progress=told.append,
        answered=lambda *seen: bar.append(seen),
    )
    here = evaluate(TARGET, **how, output=outputs[1])
    assert compared(there) == compared(here)
    assert files(outputs[0]) == files(outputs[1])
    assert len(files(outputs[1])) == 5 * 3, "the results and two tasks of five models"
    assert {name for name, _, _ in bar} == {"5 models"}
    assert "scoring 5 models on the cluster, on pig_latin_choice, docstrings" in told
    assert f"scored {TARGET} + 1.2·Δ" in " ".join(told)

    # What one has stored, the other uses: nothing is scheduled.
    for output, where in ((outputs[0], None), (outputs[1], cluster)):
        told.clear()
        again = evaluate(TARGET, **how, output=output, cluster=where, progress=told.append)
        assert again.rows == here.rows
        assert not [line for line in told if line.startswith("scor")]


@pytest.mark.slow
def test_a_failure_names_the_model_as_on_one_machine(
    cluster: RayCluster, diff: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(DIRECT, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_act": "nonsense"}))
    told: list[str] = []
    kept: list[set[str]] = []
    for where in (None, cluster):
        saved: list[Evaluation] = []
        output = tmp_path / f"out-{len(told)}"
        with pytest.raises(EvaluationError) as found:
            evaluate(
                *([TARGET, broken],),
                **{**HOW, "diff": diff},
                output=output,
                cluster=where,
                salvage=saved.append,
            )
        told.append(str(found.value))
        kept.append({path.parent.name for path in output.glob("*/results_*.json")})
        assert {row.model for row in saved[0].rows} == {str(TARGET)}
    assert told[0] == told[1]
    assert str(broken) in told[0]
    assert kept[0] == kept[1] == {"target", "target+1.0"}


@pytest.mark.slow
def test_the_command(address: str, diff: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(FAMILY)  # paths are relative to the folder of the driver
    options = ["--tasks", "pig_latin_choice", "--include-path", "tasks", "--limit", "4"]
    options += ["--device", "cpu", "--diff", str(diff), "--json"]
    there = tiny.run("eval", "target", *options, "--ray", address, "-o", str(tmp_path / "there"))
    here = tiny.run("eval", "target", *options)
    assert (there.status, here.status) == (0, 0), there.err
    rows = [json.loads(done.out)["rows"] for done in (there, here)]
    for row in rows[0]:
        assert len(row.pop("content")) == 32  # only stored scores have it
    assert rows[0] == [{k: v for k, v in row.items() if k != "content"} for row in rows[1]]
    assert "on Ray: 2 nodes" in there.err


class Machines(Here):
    """A cluster whose nodes have GPUs, in words alone."""

    def __init__(self, gpus: float) -> None:
        super().__init__()
        self._gpus = gpus

    def most_gpus(self) -> float:
        return self._gpus


class Records(Machines):
    """Refuses the work, and keeps how it would have been done."""

    def run(self, _function: Any, work: Any, **how: Any) -> Any:
        self.seen = work, how
        raise KeyboardInterrupt


def test_how_a_model_is_scored_on_a_gpu(tmp_path: Path) -> None:
    cluster = Records(4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(TARGET, **{**HOW, "device": None}, cluster=cluster, gpus_per_model=0.5)
    work, how = cluster.seen
    assert [piece.job.settings.device for piece in work] == ["cuda"]
    assert (how["gpus"], how["threads"]) == (0.5, 1)


@pytest.mark.parametrize(
    ("there", "wanted", "device", "expected"),
    [
        (0, None, None, 0),
        (8, None, None, 1),
        (8, None, "cpu", 0),
        (8, None, "cuda", 1),
        (8, 0.25, "cuda:0", 0.25),
        (8, 0, None, 0),
        (8, 2, None, 2),
    ],
)
def test_gpus_of_a_model(
    there: float, wanted: float | None, device: str | None, expected: float
) -> None:
    assert count_gpus(Machines(there), wanted, device) == expected


@pytest.mark.parametrize(
    ("wanted", "device", "said"),
    [
        (1.5, None, "1.5 is neither a share of a GPU nor a number of GPUs"),
        (-1.0, None, "-1 is neither"),
        (math.nan, None, "nan is neither"),
        (1.0, "cpu", "has no effect with the device cpu"),
        (0.0, "cuda", "0 leaves no GPU"),
        (9.0, None, "no node has 9 GPUs for Ray; the most that one has is 8"),
    ],
)
def test_no_such_share(wanted: float, device: str | None, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        count_gpus(Machines(8), wanted, device)


def test_a_gpu_where_there_is_none() -> None:
    with pytest.raises(ClusterError, match="no node has a GPU for Ray, which the device cuda"):
        evaluate(TARGET, **{**HOW, "device": "cuda"}, cluster=Machines(0))


def test_options_that_do_not_fit_together() -> None:
    with pytest.raises(OptionError, match="--gpus-per-model: is for a cluster"):
        evaluate(TARGET, **HOW, gpus_per_model=1)
    served = {**HOW, "backend": "local-completions"}
    with pytest.raises(OptionError, match=r"--ray: .* asks a server; omit it"):
        evaluate(TARGET, **served, cluster=Machines(0))


def test_another_lm_eval_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffxfer.evaluation import score_on_cluster as module

    monkeypatch.setattr(module, "_pieces", with_other_version(module._pieces))
    with pytest.raises(ClusterError, match=r"has lm-eval [0-9.]+, this machine has 0\.1"):
        evaluate(TARGET, **HOW, cluster=Machines(0))


def with_other_version(pieces: Any) -> Any:
    from dataclasses import replace

    def changed(jobs: Any) -> Any:
        found = pieces(jobs)
        versions = {**found[0].versions, "lm-eval": "0.1"}
        return [replace(piece, versions=versions) for piece in found]

    return changed


def test_one_bar_over_all_models() -> None:
    seen: list[tuple[str, int, int]] = []
    show = _request_callback(lambda *drawn: seen.append(drawn), 3)
    assert show is not None
    show(0)
    show(_packed(0, 40))  # the second and third have not begun
    show(_packed(40, 40) + _packed(7, 40))
    show(sum(_packed(40, 40) for _ in range(3)))
    assert seen == [
        ("3 models", 0, 0),
        ("3 models", 0, 120),
        ("3 models", 47, 120),
        ("3 models", 120, 120),
    ]
