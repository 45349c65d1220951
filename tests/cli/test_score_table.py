"""The table of an evaluation: what each number means, on any width, from any name."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from diffxfer.cli.score_table import print_scores
from diffxfer.evaluation.score_text import short_names
from diffxfer.evaluation.scores import BestAlpha, Evaluation, Row

EXACT = ("pig_latin", "exact_match", "none")
BITS = ("docstrings", "bits_per_byte", "none")
COMMAND = "diffxfer apply diff target -o OUT --alpha 1.0"


def row(model: str, value: float, alpha: float | None = None, **more: Any) -> Row:
    """A row of the first task, unless `more` says another."""
    values: dict[str, Any] = {
        "model": model,
        "alpha": alpha,
        "task": EXACT[0],
        "metric": EXACT[1],
        "filter": EXACT[2],
        "value": value,
        "stderr": None,
        "n": 400,
        "higher_is_better": True,
        "baseline": "target",
        "delta": None,
        "p_value": None,
        "recovered": None,
        "recovered_interval": None,
        "notes": (),
    }
    return Row(**{**values, **more})


def bits(model: str, value: float, alpha: float | None = None, **more: Any) -> Row:
    task = dict(zip(("task", "metric", "filter"), BITS, strict=True))
    return row(model, value, alpha, **{**task, "n": 220, "higher_is_better": False, **more})


def evaluation(*rows: Row, **more: Any) -> Evaluation:
    values: dict[str, Any] = {
        "rows": rows,
        "target": "target",
        "baseline": "target",
        "finetuned": None,
        "columns": tuple(dict.fromkeys(each.column for each in rows)),
        "best": None,
        "reused": (),
        "warnings": (),
        "output": None,
        "elapsed_s": 1.0,
    }
    return Evaluation(**{**values, **more})


def shown(found: Evaluation, width: int = 100) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False)
    print_scores(found, out=out)
    written: str = out.file.getvalue()  # type: ignore[attr-defined]
    return written


def in_style(found: Evaluation, style: str, width: int = 100) -> list[str]:
    """The pieces of the table that are printed bold, or dim, in their order."""
    out = Console(record=True, file=io.StringIO(), width=width, highlight=False)
    print_scores(found, out=out)
    pieces = [each.text for each in out._record_buffer if each.style and getattr(each.style, style)]
    return [piece.strip() for piece in pieces if piece.strip()]


WHOLE = evaluation(
    row("target", 0.0, stderr=0.0),
    bits("target", 2.226),
    row(
        "target",
        0.985,
        1.0,
        stderr=0.00608,
        delta=0.985,
        p_value=1e-9,
        recovered=0.985,
        recovered_interval=(0.9725, 0.9975),
    ),
    bits("target", 2.4419, 1.0, delta=0.2159, p_value=0.0312, recovered=-2.89),
    row("direct", 1.0, stderr=0.0, delta=1.0, p_value=1e-9),
    bits("direct", 2.1512, delta=-0.0748, notes=("its samples are not numbers",)),
    finetuned="direct",
    best=BestAlpha(1.0, "pig_latin", "exact_match", 0.985, COMMAND),
)


def test_the_whole_table() -> None:
    lines = [line.rstrip() for line in shown(WHOLE).splitlines()]
    assert lines == [
        "                pig_latin                docstrings",
        "model           exact_match ↑            bits_per_byte ↓",
        "",
        "target          0.0000 ± 0.0000          2.2260",
        "baseline",
        "",
        "target + 1.0·Δ  0.9850 ± 0.0061          2.4419",
        "                +0.9850 p<0.001          +0.2159 p=0.031",
        "                recovers 98 % [97, 100]  worse than the target",
        "",
        "direct          1.0000 ± 0.0000          2.1512",
        "finetuned       +1.0000 p<0.001          -0.0748 ¹",
        "",
        "¹ its samples are not numbers",
        "n = 400 (pig_latin), 220 (docstrings)",
        "± standard error",
        "+ and -: difference from target; p: McNemar's exact test or sign-flip permutation, paired",
        "recovers: share of direct's gain over target, 95 % bootstrap interval",
        "",
        "best alpha by pig_latin: 1.0 (exact_match 0.9850)",
        COMMAND,
    ]


def test_nothing_scored_is_nothing_printed() -> None:
    assert shown(evaluation()) == ""
    assert shown(evaluation(columns=(EXACT,))) == ""
    assert shown(evaluation(row("target", 1.0), columns=())) == ""


def test_one_model_needs_no_explanation() -> None:
    lines = shown(evaluation(row("target", 0.5))).splitlines()
    assert [line.strip() for line in lines[-2:]] == ["", "n = 400 (pig_latin)"]


def test_only_the_columns_that_were_asked_for() -> None:
    found = evaluation(row("target", 0.5), bits("target", 2.0), columns=(EXACT,))
    assert "docstrings" not in shown(found)


def test_a_model_without_a_score_has_an_empty_cell() -> None:
    text = shown(evaluation(row("target", 0.5), bits("target", 2.0), bits("other", 3.0)))
    assert [line.split() for line in text.splitlines() if line.startswith("other")] == [
        ["other", "3.0000"]
    ]


class TestBold:
    HEADS = ("model", "pig_latin", "docstrings")

    def best(self, *rows: Row) -> list[str]:
        return [text for text in in_style(evaluation(*rows), "bold") if text not in self.HEADS]

    def test_is_the_best_of_each_column(self) -> None:
        rows = (row("a", 0.5), bits("a", 2.5), row("b", 0.6), bits("b", 2.6))
        assert self.best(*rows) == ["2.5000", "0.6000"]

    def test_is_every_best_one(self) -> None:
        assert self.best(row("a", 0.5), row("b", 0.1 + 0.2 + 0.2), row("c", 0.1)) == ["0.5000"] * 2

    @pytest.mark.parametrize(
        "rows",
        [
            (row("a", 0.5),),
            (row("a", 0.5, higher_is_better=None), row("b", 0.6, higher_is_better=None)),
            (row("a", float("nan")), row("b", float("nan"))),
        ],
    )
    def test_is_nothing_where_nothing_is_best(self, rows: tuple[Row, ...]) -> None:
        assert self.best(*rows) == []

    def test_is_no_number_that_is_none(self) -> None:
        assert self.best(row("a", float("nan")), row("b", 0.5)) == ["0.5000"]

    def test_leaves_the_roles_dim(self) -> None:
        assert in_style(WHOLE, "dim") == ["baseline", "finetuned"]


class TestFootnotes:
    def test_are_listed_once_in_the_order_of_their_marks(self) -> None:
        first, second = "only 1 sample", "finetuned gains nothing over the target"
        text = shown(
            evaluation(
                row("target", 0.5),
                row("target", 0.6, 0.5, delta=0.1, notes=(first, second)),
                row("target", 0.7, 1.0, delta=0.2, p_value=0.5, recovered=1.0, notes=(second,)),
                row("other", 0.5, delta=0.0, notes=(first,)),
                finetuned="direct",
            )
        )
        assert "+0.1000 ¹ ²" in text
        assert "+0.2000 p=0.5  " in text
        assert "recovers 100 % ²" in text
        assert "+0.0000 ¹" in text
        assert text.count(first) == text.count(second) == 1
        assert text.index(f"¹ {first}") < text.index(f"² {second}")

    def test_mark_the_number_that_is_missing(self) -> None:
        text = shown(
            evaluation(
                row("target", 0.5),
                row("target", 0.6, 1.0, delta=0.1, recovered=0.5, notes=("no p", "no interval")),
            )
        )
        assert "+0.1000 ¹" in text
        assert "recovers 50 % ²" in text

    def test_have_marks_of_several_digits(self) -> None:
        rows = [row(f"m{i}", 0.5, delta=0.1, notes=(f"note {i}",)) for i in range(1, 13)]
        assert "¹² note 12" in shown(evaluation(*rows))

    def test_are_not_listed_for_rows_that_are_not_shown(self) -> None:
        found = evaluation(row("a", 0.5), bits("a", 2.0, notes=("hidden",)), columns=(EXACT,))
        assert "hidden" not in shown(found)


class TestNumbers:
    @pytest.mark.parametrize(
        ("p_value", "text"),
        [(0.00099, "p<0.001"), (0.001, "p=0.001"), (0.0312, "p=0.031"), (1.0, "p=1")],
    )
    def test_chances(self, p_value: float, text: str) -> None:
        found = evaluation(row("target", 0.5), row("other", 0.6, delta=0.1, p_value=p_value))
        assert f"+0.1000 {text}\n" in re.sub(" +\n", "\n", shown(found))

    def test_that_are_huge_stay_short(self) -> None:
        text = shown(evaluation(bits("a", 1.5e30), bits("b", float("inf"))))
        assert "1.5e+30" in text
        assert "inf" in text

    def test_of_samples_that_differ_from_model_to_model(self) -> None:
        text = shown(evaluation(row("a", 0.5, n=1390), row("b", 0.5, n=1400)))
        assert "n = 1,390 to 1,400 (pig_latin)" in text

    def test_of_samples_that_tasks_share_are_said_once(self) -> None:
        text = shown(evaluation(row("a", 0.5), row("a", 0.5, task="other"), bits("a", 2.0)))
        assert "n = 400 (pig_latin, other), 220 (docstrings)" in text

    def test_filter_is_in_the_head_where_there_is_one(self) -> None:
        text = shown(evaluation(row("a", 0.5, filter="strict-match"), row("a", 0.4)))
        assert [line.split() for line in text.splitlines()[:3]] == [
            ["pig_latin"],
            ["exact_match", "↑", "pig_latin"],
            ["model", "strict-match", "exact_match", "↑"],
        ]


class TestWidth:
    @pytest.mark.parametrize("width", [20, 30, 40, 50, 60, 80, 120])
    def test_is_kept_and_nothing_is_cut(self, width: int) -> None:
        text = shown(WHOLE, width).replace(COMMAND, "")
        assert all(cell_len(line) <= width for line in text.splitlines())
        assert "…" not in text
        squeezed = "".join(text.split())
        for value in ("0.9850", "2.4419", "p=0.031", "2.1512", "finetuned"):
            assert value in squeezed or width < 40

    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_many_columns_become_several_tables(self, width: int) -> None:
        tasks = [f"mmlu_{i}" for i in range(12)]
        models = ("target", "direct")
        text = shown(evaluation(*(row(m, 0.5, task=t) for m in models for t in tasks)), width)
        heads = [line.split() for line in text.splitlines() if line.startswith("  ")]
        heads = [head for head in heads if head and head[0].startswith("mmlu_")]
        assert len(heads) > 1
        assert [name for head in heads for name in head] == tasks
        assert text.count("\ntarget ") == len(heads)
        assert all(cell_len(line) <= width for line in text.splitlines())

    def test_long_heads_are_folded_before_numbers_are(self) -> None:
        long = "a_task_with_a_name_that_goes_on_and_on_and_on"
        text = shown(evaluation(row("target", 0.5, stderr=0.01, task=long)), 60)
        assert "0.5000 ± 0.0100" in text
        assert long[:24] in text
        assert long[24:] in text

    def test_a_wide_script_is_counted_as_wide(self) -> None:
        text = shown(evaluation(row("模型" * 30, 0.5), row("b", 0.25)), 40)
        assert all(cell_len(line) <= 40 for line in text.splitlines())
        assert text.count("模") == 30

    def test_command_is_on_one_line(self) -> None:
        long = f"diffxfer apply {'very/' * 40}diff target -o OUT"
        best = BestAlpha(1.0, "pig_latin", "exact_match", 0.5, long)
        assert long in shown(replace(WHOLE, best=best), 40).splitlines()

    def test_is_that_of_the_lines_where_nobody_watches(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = "/a/very/long/path" * 20
        tasks = [f"mmlu_{'x' * 60}_{i}" for i in range(40)]
        print_scores(evaluation(*(row(model, 0.5, task=task) for task in tasks)))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == tasks
        assert [line.split()[0] for line in lines[1:3]] == ["model", "path"]


class TestNames:
    @pytest.mark.parametrize("width", [60, 100])
    def test_do_nothing_to_a_terminal(self, width: int) -> None:
        evil = "[red]x[/red]\x1b[2J\u202e"
        text = shown(
            evaluation(
                row(evil, 0.5, task=evil, metric=evil, filter=evil),
                row(evil, 0.6, 1.0, task=evil, metric=evil, filter=evil, delta=0.1, notes=(evil,)),
                baseline=evil,
                best=BestAlpha(1.0, evil, evil, 0.5, f"diffxfer apply {evil}"),
            ),
            width,
        )
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert r"diffxfer apply [red]x[/red]\x1b[2J\u202e" in text
        assert "".join(text.split()).count("[red]x") >= 8

    def test_of_models_are_as_short_as_tells_them_apart(self) -> None:
        deep = "/data/models/of/mine"
        assert short_names([f"{deep}/runs/a", f"{deep}/runs/b", "llama", ""]) == {
            f"{deep}/runs/a": "a",
            f"{deep}/runs/b": "b",
            "llama": "llama",
            "": "",
        }
        models = ["/data/one/runs/a", "/data/two/runs/a", "meta-llama/Llama-3.1-8B", "a"]
        names = ["one/runs/a", "two/runs/a", "Llama-3.1-8B", "a"]
        assert short_names(models) == dict(zip(models, names, strict=True))
        assert short_names(["x/a", "a", "x/a/"]) == {"x/a": "x/a", "a": "a", "x/a/": "x/a/"}

    def test_of_a_model_that_is_both_say_so(self) -> None:
        text = shown(evaluation(row("target", 0.5), row("a", 0.6), finetuned="target"))
        assert [line.strip() for line in text.splitlines()[3:5]] == ["baseline", "finetuned"]
