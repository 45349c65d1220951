"""Which steps of a chain run at once: never before what they read, nor after it is removed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffxfer.recycling.chain_disk import ModelSize, peak_disk_bytes, peak_disk_bytes_at_once
from diffxfer.recycling.chain_on_cluster import StepStopped, _Schedule, _train_there
from diffxfer.recycling.chain_plan import (
    ROUNDS_AT_ONCE,
    Step,
    StepKind,
    plan_chain,
    removable_folders,
)
from diffxfer.recycling.chain_steps import StepContext
from tests.recycling.test_chain_plan import ROWS, RUN, made, recipes
from tests.recycling.training import FAMILY

if TYPE_CHECKING:
    from diffxfer.recycling.recipe import Recipe

SCORED = {"tasks": ["t"]}


def test_controls_run_beside_the_recycled_model() -> None:
    plan = made(train=ROWS, eval=SCORED, controls=["base", "direct"], alpha=[1, 2], mode="dir")
    steps = plan_chain(plan, RUN)
    schedule = _Schedule(steps)
    seen = []
    while ready := schedule.take_ready():
        seen.append([steps[index].key.removeprefix("round-0") for index in ready])
        for index in ready:
            schedule.end(index)
    assert seen == [
        ["1/scores", "1/diff", "2/direct"],
        ["2/alpha", "2/diff", "3/direct"],
        ["2/graft", "3/alpha"],
        ["2/model", "3/graft"],
        ["2/scores", "3/model"],
        ["3/scores"],
    ]


@given(recipes(), st.randoms(use_true_random=False))
def test_in_any_order_of_ends(plan: Recipe, random: object) -> None:
    steps = plan_chain(plan, RUN)
    schedule = _Schedule(steps)
    there = {Path(path) for path in (*plan.bases, plan.finetuned) if path}
    running: list[int] = []
    ended: set[str] = set()
    while True:
        for index in schedule.take_ready():
            step = steps[index]
            assert set(step.inputs) <= there, step
            if step.kind is StepKind.GRAFT and len(plan.alphas) > 1:
                assert f"round-{step.round:02}/alpha" in ended
            running.append(index)
        # Choosing alpha and scoring write to one folder.
        writing = [steps[i].round for i in running if steps[i].name in ("alpha", "scores")]
        assert len(writing) == len(set(writing))
        rounds = {steps[index].round for index in running}
        assert not rounds or max(rounds) - min(rounds) < ROUNDS_AT_ONCE
        if not running:
            break
        index = running.pop(random.randrange(len(running)))  # type: ignore[attr-defined]
        left = schedule.end(index)
        ended.add(steps[index].key)
        assert {step.key for step in left} == {step.key for step in steps} - ended
        there |= {steps[index].out} - {None}
        there -= set(removable_folders(steps, ended, plan.keep))
    assert len(ended) == len(steps)


def test_a_failure_stops_what_comes_after_it() -> None:
    steps = plan_chain(made(train=ROWS, eval=SCORED, controls=["direct"]), RUN)
    schedule = _Schedule(steps)
    scores, diff, direct = schedule.take_ready()
    assert [steps[index].name for index in (scores, diff, direct)] == ["scores", "diff", "direct"]
    schedule.stop_after(diff)
    schedule.check(scores)()
    with pytest.raises(StepStopped):
        schedule.check(direct)(1, 2, 0.5)
    schedule.end(scores)
    assert not schedule.take_ready()


class Records:
    """A cluster whose nodes have eight GPUs; it keeps how work would have been done."""

    def most_gpus(self) -> float:
        return 8

    def threads(self, wanted: int | None) -> int:
        return wanted or 6

    def run(self, _function: Any, work: Any, **how: Any) -> Any:
        self.seen = work[0], how
        yield 0, {"log": []}


@pytest.mark.parametrize(
    ("train", "wanted", "device", "gpus"),
    [
        (ROWS, 4, "cuda", 1),  # one process trains
        (ROWS, 0, "cpu", 0),
        (ROWS | {"device": "cpu"}, 4, "cpu", 0),
        ({"command": "accelerate launch t.py {model} {output}"}, 4, None, 4),
    ],
)
def test_gpus_of_a_training(
    train: dict[str, Any], wanted: float, device: str | None, gpus: float
) -> None:
    cluster = Records()
    context = StepContext(made(train=train), RUN, RUN, print, None, None)
    tune = Step(2, "direct", StepKind.TUNE, (FAMILY / "target",), RUN / "round-02" / "direct")
    found = _train_there(cluster, wanted, print, tune, context)  # type: ignore[arg-type]
    piece, how = cluster.seen
    assert found == {"log": []}
    assert (piece.recipe.train.device, how["gpus"]) == (device, gpus)
    assert how["threads"] == (1 if gpus else 6)


@given(recipes())
def test_steps_at_once_need_no_less_disk(plan: Recipe) -> None:
    steps = plan_chain(plan, RUN)
    size = ModelSize(disk_bytes=100, parameters=50)
    sizes = {path: size for path in (*plan.bases, plan.finetuned) if path}
    one_by_one = peak_disk_bytes(steps, steps, plan, sizes)
    assert peak_disk_bytes_at_once(steps, steps, plan, sizes) >= one_by_one


def test_disk_of_two_rounds() -> None:
    plan = made(bases=["/m1", "/m2", "/m3", "/m4"], keep="last")
    steps = plan_chain(plan, RUN)
    sizes = {path: ModelSize(100, 50) for path in (*plan.bases, plan.finetuned) if path}
    # Rounds 2 and 3 write a graft and a diff vector each, while that of round 1 is read; a diff
    # vector is on the disk twice while it is packed.
    assert peak_disk_bytes_at_once(steps, steps, plan, sizes) == 700
    assert peak_disk_bytes(steps, steps, plan, sizes) == 300
