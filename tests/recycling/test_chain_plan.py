"""The plan of a chain: steps read what exists, and removed folders are not needed later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffxfer.checkpoints.reader import open_checkpoint
from diffxfer.recycling.chain_disk import ModelSize, model_size, peak_disk_bytes
from diffxfer.recycling.chain_plan import CONTROLS, Step, StepKind, plan_chain, removable_folders
from diffxfer.recycling.recipe import Recipe
from tests.recycling.chains import EVAL, recipe
from tests.recycling.training import FAMILY

RUN = Path("/run")
ROWS = {"data": "org/rows", "steps": 3}


def made(**changes: Any) -> Recipe:
    known = {"bases": ["/m1", "/m2", "/m3"], "finetuned": "/sft"} | changes
    return Recipe.model_validate(recipe(**known))


def told(steps: tuple[Step, ...]) -> list[str]:
    """Each step as a short line."""
    return [
        f"{step.round} {step.name} = {step.kind.value}"
        f"({', '.join(str(path).removeprefix('/run/round-0') for path in step.inputs)})"
        for step in steps
    ]


class TestPlans:
    def test_nothing_but_grafts(self) -> None:
        assert told(plan_chain(made(), RUN)) == [
            "1 diff = extract(/sft, /m1)",
            "2 graft = graft(1/diff, /m2)",
            "2 diff = extract(2/graft, /m2)",
            "3 graft = graft(2/diff, /m3)",
        ]

    def test_recycled(self) -> None:
        plan = plan_chain(
            made(
                finetuned=None,
                train={**ROWS, "teacher": "previous"},
                eval={"tasks": ["t"]},
                alpha=[1, 2],
                controls=["direct", "base"],
            ),
            RUN,
        )
        assert told(plan) == [
            "1 model = tune(/m1)",
            "1 scores = score(/m1, 1/model)",
            "1 diff = extract(1/model, /m1)",
            "2 alpha = choose(1/diff, /m2)",
            "2 graft = graft(1/diff, /m2)",
            "2 model = tune(2/graft, 1/model)",
            "2 direct = tune(/m2)",
            "2 scores = score(/m2, 2/graft, 2/model, 2/direct)",
            "2 diff = extract(2/model, /m2)",
            "3 alpha = choose(2/diff, /m3)",
            "3 graft = graft(2/diff, /m3)",
            "3 model = tune(3/graft, 2/model)",
            "3 direct = tune(/m3)",
            "3 scores = score(/m3, 3/graft, 3/model, 3/direct)",
        ]
        assert plan[-1].columns == ("base", "graft", "tuned", "direct")

    def test_the_arms_of_distillation(self) -> None:
        plan = plan_chain(
            made(
                bases=["/m1", "/m2"],
                train={**ROWS, "teacher": "previous"},
                eval={"tasks": ["t"]},
                controls=["direct", "initialised", "distilled"],
            ),
            RUN,
        )
        assert told(plan) == [
            "1 scores = score(/sft)",
            "1 diff = extract(/sft, /m1)",
            "2 graft = graft(1/diff, /m2)",
            "2 model = tune(2/graft, /sft)",
            "2 direct = tune(/m2)",
            "2 initialised = tune(2/graft)",
            "2 distilled = tune(/m2, /sft)",
            "2 scores = score(2/graft, 2/model, 2/direct, 2/initialised, 2/distilled)",
        ]

    def test_of_plain_tuning(self) -> None:
        plan = plan_chain(
            made(mode="dir", train={**ROWS, "teacher": "/t"}, eval={"tasks": ["t"]}, controls=[]),
            RUN,
        )
        assert told(plan) == [
            "1 scores = score(/sft)",
            "1 diff = extract(/sft, /m1)",
            "2 graft = graft(1/diff, /m2)",
            "2 model = tune(2/graft, /t)",
            "2 direct = tune(/m2)",
            "2 scores = score(2/graft, 2/model)",
            "2 diff = extract(2/direct, /m2)",
            "3 graft = graft(2/diff, /m3)",
            "3 model = tune(3/graft, /t)",
            "3 scores = score(3/graft, 3/model)",
        ]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    count = draw(st.integers(2, 6))
    train = draw(st.sampled_from([None, ROWS, ROWS | {"teacher": "previous"}]))
    scored = draw(st.sampled_from([None, {"tasks": EVAL["tasks"]}]))
    modes = ["iter", "dir"] if train or count == 2 else ["iter"]
    controls = ["base", "direct"] if train else ["base"]
    if train and "teacher" in train:
        controls += ["initialised", "distilled"]
    return made(
        # The same base may come twice.
        bases=draw(st.lists(st.sampled_from(["/a", "/b", "/c"]), min_size=count, max_size=count)),
        finetuned=draw(st.sampled_from(["/sft", *([None] if train else [])])),
        mode=draw(st.sampled_from(modes)),
        alpha=draw(st.sampled_from([0.5, *([[0.5, 1.0]] if scored else [])])),
        train=train,
        eval=scored,
        controls=draw(st.lists(st.sampled_from(controls), unique=True)),
        keep=draw(st.sampled_from(["all", "models", "last"])),
    )


@given(recipes())
def test_what_is_read_is_an_input_or_made_before(plan: Recipe) -> None:
    there = {Path(path) for path in (*plan.bases, plan.finetuned) if path}
    keys = set()
    for step in plan_chain(plan, RUN):
        assert set(step.inputs) <= there, step
        assert step.key not in keys
        keys.add(step.key)
        if step.out is not None:
            assert step.out not in there
            assert step.out == RUN / step.key
            there.add(step.out)
        assert (step.kind is StepKind.SCORE) == bool(step.columns)
        assert not step.columns or len(step.columns) == len(step.inputs)


@given(recipes())
def test_nothing_goes_before_it_was_read_for_the_last_time(plan: Recipe) -> None:
    steps = plan_chain(plan, RUN)
    gone: set[Path] = set()
    for number, step in enumerate(steps, 1):
        assert gone.isdisjoint(step.inputs)
        removed = removable_folders(steps, [other.key for other in steps[:number]], plan.keep)
        assert gone <= set(removed), "what went stays gone"
        gone = set(removed)
    made_here = {step.out for step in steps if step.kind not in (StepKind.SCORE, StepKind.CHOOSE)}
    stays = {path.name for path in made_here - gone if path is not None}
    match plan.keep:
        case "all":
            assert not gone
        case "models":
            assert stays <= {"model", "graft", *CONTROLS}
            assert ("graft" in stays) == (plan.train is None)
            assert not [path for path in gone if path.name in ("model", *CONTROLS)]
        case _:
            last = "model" if plan.train else "graft"
            assert made_here - gone == {RUN / f"round-{len(plan.bases):02}" / last}


SIZES = {path: ModelSize(100, 50) for path in ("/a", "/b", "/c", "/sft", "/m1", "/m2", "/m3")}


@given(recipes())
def test_the_disk_needed_is_no_less_than_what_is_kept(plan: Recipe) -> None:
    steps = plan_chain(plan, RUN)
    folders = [step for step in steps if step.out and step.kind is not StepKind.SCORE]
    removed = removable_folders(steps, [step.key for step in steps], plan.keep)
    peak = peak_disk_bytes(steps, steps, plan, SIZES)
    assert peak >= 100 * (len(folders) - len(removed))
    if plan.train is None and plan.keep == "all" and len(plan.alphas) == 1:
        assert peak == 100 * len(folders)
    # A run that starts later does not need more.
    assert peak_disk_bytes(steps[1:], steps, plan, SIZES) <= peak


@pytest.mark.parametrize(
    ("changes", "peak"),
    [
        ({}, 400),
        ({"keep": "models"}, 300),  # grafts of three rounds but the first, and a diff vector
        ({"keep": "last"}, 300),  # a graft, and a diff vector twice while it is packed
        # Six folders, and the weights in float32.
        ({"train": ROWS}, 600 + 4 * 50),
        ({"train": {**ROWS, "steps": 200}}, 600 + 4 * 50 * 7),
        ({"train": {"command": "run {model} {output}"}}, 600),
        ({"alpha": [1, 2], "eval": {"tasks": ["t"]}}, 400),
    ],
)
def test_the_disk_needed(changes: dict[str, Any], peak: int) -> None:
    plan = made(**changes)
    steps = plan_chain(plan, RUN)
    assert peak_disk_bytes(steps, steps, plan, SIZES) == peak


def test_a_size_counts_companions() -> None:
    model = open_checkpoint(FAMILY / "target", "target")
    files_bytes = sum(path.stat().st_size for path in model.folder.iterdir())
    assert model_size(model) == ModelSize(files_bytes, model.elements)


def test_the_sizes_are_those_of_what_is_grafted_on() -> None:
    plan = made(bases=["/m1", "/m2"])
    sizes = SIZES | {"/m2": ModelSize(1000, 500), "/sft": ModelSize(110, 55)}
    steps = plan_chain(plan, RUN)
    assert peak_disk_bytes(steps, steps, plan, sizes) == 110 + 1000
