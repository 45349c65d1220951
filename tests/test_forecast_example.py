"""The experiment behind the forecast: its parts, and the rule in the code against its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from diffxfer.family import family_folder
from diffxfer.probing.forecast_rule import RULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def part() -> Iterator[Callable[[str], Any]]:
    """A module of the example by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str(EXAMPLES / "forecast"))
        yield import_module


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The measurements in the repository."""
    text = (EXAMPLES / "forecast" / "measurements.json").read_text("utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return found


@pytest.mark.parametrize("basis", RULES)
def test_the_rule_in_the_code_is_what_the_measurements_give(
    part: Callable[[str], Any], rows: list[dict[str, Any]], basis: str
) -> None:
    fitting, rule = part("fitting"), RULES[basis]
    knots = fitting.fit(rows, basis)
    held = [(knot.ratio, knot.low, knot.expected, knot.high) for knot in rule.knots]
    assert held == [pytest.approx(knot, abs=0.11) for knot in knots]
    known, others = (fitting.graded(rows, held_out=held_out) for held_out in (False, True))
    assert (rule.settings, rule.families) == (len(known), len({r["family"] for r in known}))
    found = fitting.record(others, basis, held)
    assert {key: getattr(rule.record, key) for key in found} == found


def test_the_measurements_are_enough(rows: list[dict[str, Any]]) -> None:
    counted = [row for row in rows if row["recovery"] is not None]
    assert len(counted) >= 60
    assert len({row["family"] for row in counted}) >= 4
    assert len({row["family"] for row in counted if row["held_out"]}) == 2
    for row in counted:
        gain = row["direct"] - row["target"]
        assert gain >= 20
        share = 100 * (row["graft"] - row["target"]) / gain
        assert row["recovery"] == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("basis", "ratio"), [("activations", "activation_ratio"), ("weights", "weight_ratio")]
)
def test_spearman_and_share_inside_by_hand(
    rows: list[dict[str, Any]], basis: str, ratio: str
) -> None:
    """Ranks and ranges counted here, from the file and the public forecast."""
    from diffxfer.probing.forecast import forecast

    held_out = [row for row in rows if row["held_out"] and row["recovery"] is not None]
    shares = [min(max(row["recovery"], 0), 100) for row in held_out]
    inside = errors = 0.0
    for row, share in zip(held_out, shares, strict=True):
        each = forecast(row[ratio]) if basis == "weights" else forecast(1.0, row[ratio])
        inside += each.low - 0.1 <= share <= each.high + 0.1
        errors += abs(each.expected - share)
    record = RULES[basis].record
    assert record.inside == pytest.approx(100 * inside / len(held_out), abs=0.1)
    assert record.mean_error == pytest.approx(errors / len(held_out), abs=0.1)

    def ranks(values: list[float]) -> torch.Tensor:
        below = [sum(other < value for other in values) for value in values]
        same = [sum(other == value for other in values) for value in values]
        return torch.tensor([b + s / 2 for b, s in zip(below, same, strict=True)]).double()

    pair = torch.stack([ranks([row[ratio] for row in held_out]), ranks(shares)])
    assert record.spearman == pytest.approx(-float(torch.corrcoef(pair)[0, 1]), abs=0.006)


def test_the_rule_never_looks_at_held_out_families(
    part: Callable[[str], Any], rows: list[dict[str, Any]]
) -> None:
    fitting = part("fitting")
    others = [
        {**row, "recovery": 50.0, "activation_ratio": 0.1} if row["held_out"] else row
        for row in rows
    ]
    assert fitting.fit(others, "activations") == fitting.fit(rows, "activations")


def test_the_rule_widens_for_families_that_differ(part: Callable[[str], Any]) -> None:
    fitting = part("fitting")

    def family(name: str, half: float) -> list[dict[str, Any]]:
        ratios = [0.02 * 1.25**i for i in range(20)]
        return [
            {
                "family": name,
                "held_out": False,
                "activation_ratio": ratio,
                "recovery": 100 / (1 + (ratio / half) ** 4),
            }
            for ratio in ratios
        ]

    alike = family("a", 0.2) + family("b", 0.2)
    different = family("a", 0.1) + family("b", 0.4)
    assert fitting.margin_needed(alike, "activations") == 0
    assert fitting.margin_needed(different, "activations") > 0.2
    low, expected, high = fitting.looked_up(
        fitting.raw_knots(alike, "activations"), [0.05, 0.2, 1.0]
    ).T
    assert expected == pytest.approx([100, 50, 0], abs=12)
    assert (low <= expected).all()
    assert (expected <= high).all()


def test_answers(part: Callable[[str], Any]) -> None:
    tasks = part("tasks")
    answers = {**tasks.WORD_TASKS, **tasks.NUMBER_TASKS}
    for task, question, answer in (
        ("next letters", "hazy", "ibaz"),
        ("third letters", "xyz", "abc"),
        ("plural", "city", "cities"),
        ("plural", "day", "days"),
        ("plural", "box", "boxes"),
        ("next vowels", "string", "strong"),
        ("letters in order", "hello", "ehllo"),
        ("backwards", "hello", "olleh"),
        ("nines", "01299", "98700"),
    ):
        assert answers[task](question) == answer


@pytest.mark.parametrize("task", ["letters in order", "nines"])
def test_no_graded_answer_was_trained_on(part: Callable[[str], Any], task: str) -> None:
    tasks = part("tasks")
    text = (family_folder() / "text.txt").read_text("utf-8")
    words = tasks.words_of([text])
    trained, chosen_on, graded_on = tasks.task_rows(task, words)
    assert len(chosen_on) == 200
    assert graded_on
    assert not {answer for _, answer in trained} & {answer for _, answer in graded_on}


def tiny(part: Callable[[str], Any], kind: str) -> Any:
    families = part("families")
    family = families.Family("tiny", kind, 32, 2, "ascii", ())
    return families.new_model(family, 95, 3).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_a_permuted_copy_computes_the_same(part: Callable[[str], Any], kind: str) -> None:
    targets = part("targets")
    model = tiny(part, kind)
    with torch.no_grad():  # biases that are 0 would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.arange(20)[None]
    for copy in (targets.permuted(model), targets.permuted(model, 1)):
        with torch.no_grad():
            expected, found = (each(input_ids=ids).logits for each in (model, copy))
        torch.testing.assert_close(found, expected)
        changed = [
            name
            for name, weight in copy.named_parameters()
            if not torch.equal(weight, model.get_parameter(name))
        ]
        assert changed


def test_the_score_is_that_of_greedy_generation(part: Callable[[str], Any]) -> None:
    training = part("training")
    model = tiny(part, "llama")
    asked = torch.randint(95, (6, 5), generator=torch.Generator().manual_seed(0))
    written = model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=4,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    labels = written.clone()
    labels[:, :5] = -100
    assert training.score(model, (written, labels)) == 100
    wrong, wrong_labels = written.clone(), labels.clone()
    for row, place in ((0, 5), (3, 8)):  # the first and the last token of an answer
        wrong[row, place] = wrong_labels[row, place] = (written[row, place] + 1) % 95
    assert training.score(model, (wrong, wrong_labels)) == pytest.approx(100 * 4 / 6)


def test_grafts_and_targets_are_plain_arithmetic(part: Callable[[str], Any]) -> None:
    measuring, targets = part("measuring"), part("targets")
    base, finetuned, target = (tiny(part, "llama") for _ in range(3))
    with torch.no_grad():
        for parameter in finetuned.parameters():
            parameter.add_(0.5)
        for parameter in target.parameters():
            parameter.add_(0.25)
    found = measuring.distances(base, finetuned, target)
    assert found["weight_ratio"] == pytest.approx(0.5, rel=1e-5)
    graft = measuring.grafted(base, finetuned, target, 2.0)
    for name, weight in graft.named_parameters():
        torch.testing.assert_close(weight, base.get_parameter(name) + 1.25)
    line = targets.moved(base.state_dict(), target.state_dict(), 2.0)
    torch.testing.assert_close(line["lm_head.weight"], base.lm_head.weight.detach() + 0.5)
    noisy = targets.noisy({"w": torch.arange(10_000.0).reshape(100, 100)}, 0.1)["w"]
    noise = (noisy - torch.arange(10_000.0).reshape(100, 100)).std()
    assert float(noise) == pytest.approx(0.1 * 2886.9, rel=0.03)
    assert measuring.recovery({"graft": 60.0, "target": 20.0, "direct": 100.0}) == 50


@pytest.mark.slow
def test_a_family_from_nothing_and_again(
    part: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, targets = part("run_forecast"), part("targets")
    monkeypatch.setattr(run, "BASE_STEPS", 3)
    monkeypatch.setattr(run, "UNRELATED_STEPS", 3)
    monkeypatch.setattr(
        run, "TRAINED", {name: (2, *how[1:]) for name, how in targets.TRAINED.items()}
    )
    family = run.FAMILIES[2]
    family = replace(family, tunes=tuple(replace(tune, steps=2) for tune in family.tunes))
    texts = dict.fromkeys(
        ("base", "docs", "code"), (family_folder() / "text.txt").read_text("utf-8").split("\n\n")
    )
    tasks = [tune.task for tune in family.tunes]
    rows = run.measure(family, tmp_path / "work", texts, tasks)
    assert len(rows) == len(targets.ON_FIRST) + len(targets.ON_SECOND)
    # Nothing was learned in two steps, so nothing counts.
    assert {row["recovery"] for row in rows} == {None}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert run.measure(family, tmp_path / "work", texts, tasks) == rows
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()} == files
