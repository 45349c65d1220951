"""An evaluation as a table: one row per model, one column per metric, with explanations.

Names come from untrusted folders, tasks and files, so they are made printable and are not
interpreted as markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from diffxfer.cli.table import folded, make_table, stdout
from diffxfer.errors import printable
from diffxfer.evaluation.score_text import (
    best_value,
    chance_text,
    number_text,
    share_text,
    short_names,
)
from diffxfer.evaluation.scores import Evaluation, Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Column: TypeAlias = tuple[str, str, str]
Subject: TypeAlias = tuple[str, float | None]

_GAP = 2
_WIDEST_NAME = 24
_NARROWEST_NAME = 8
_ARROWS = {True: " ↑", False: " ↓", None: ""}
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def print_scores(evaluation: Evaluation, *, out: Console | None = None) -> None:
    """Print the scores of models side by side, with explanations below.

    Args:
        evaluation: the scores; if there are none, nothing is printed.
        out: the console; stdout by default, without folding lines if it is not a terminal.
    """
    from rich.text import Text

    out = out or stdout()
    view = _View(evaluation, out.width)
    if not view.subjects:
        return
    for number, table in enumerate(view.tables()):
        if number:
            out.print()
        out.print(table)
    out.print()
    for line in view.remarks():
        out.print(folded(line))
    if evaluation.best is not None:
        best = evaluation.best
        out.print()
        value = f"{best.metric} {number_text(best.value)}"
        found = f"best alpha by {best.task}: {best.alpha!r} ({value})"
        out.print(folded(found))
        # On one line, however long, so that the command can be copied.
        out.print(Text(printable(best.command)), soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Cells:
    """One column of a table: its head, its cell for each model, and its width."""

    head: Text
    cells: tuple[Text, ...]
    width: int


class _View:
    """The view of an evaluation: its rows, names and footnote marks."""

    def __init__(self, evaluation: Evaluation, width: int) -> None:
        self._evaluation = evaluation
        self._width = width
        # The most width of names and heads; longer ones are folded to leave space for numbers.
        self._most = max(_WIDEST_NAME, width // 3)
        self._columns = evaluation.columns
        asked = set(evaluation.columns)
        self._rows: dict[tuple[Subject, Column], Row] = {
            ((row.model, row.alpha), row.column): row
            for row in evaluation.rows
            if row.column in asked
        }
        self.subjects: list[Subject] = list(dict.fromkeys(subject for subject, _ in self._rows))
        named = (row.model for row in evaluation.rows)
        also = (evaluation.target, evaluation.baseline, evaluation.finetuned or "")
        self._short = short_names([*named, *also])
        notes = (note for row in self._shown() for note in row.notes)
        self._marks = {note: number for number, note in enumerate(dict.fromkeys(notes), 1)}

    def _shown(self, column: Column | None = None) -> Iterator[Row]:
        """The rows of the table, model by model, of one column or of all."""
        columns = self._columns if column is None else (column,)
        for subject in self.subjects:
            for each in columns:
                if (subject, each) in self._rows:
                    yield self._rows[subject, each]

    def tables(self) -> Iterator[Table]:
        """The columns, split into as many tables as needed to fit the width."""
        columns = [self._column(column) for column in self._columns]
        names = [self._name(subject) for subject in self.subjects]
        beside = self._width - _GAP - max(column.width for column in columns)
        name = max(min(_width(*names), self._most, beside), _NARROWEST_NAME)
        chunk: list[_Cells] = []
        for column in columns:
            if chunk and name + sum(each.width + _GAP for each in [*chunk, column]) > self._width:
                yield _table(name, names, chunk)
                chunk = []
            chunk.append(column)
        yield _table(name, names, chunk)

    def _name(self, subject: Subject) -> Text:
        from rich.text import Text

        model, alpha = subject
        if alpha is not None:
            return Text(f"{self._short[model]} + {alpha!r}·Δ", overflow="fold")
        roles = {"baseline": self._evaluation.baseline, "finetuned": self._evaluation.finetuned}
        name = Text(self._short[model], overflow="fold")
        for role in (role for role, label in roles.items() if label == model):
            name.append(f"\n{role}", "dim")
        return name

    def _column(self, column: Column) -> _Cells:
        """One column; a long head is folded to the width of the cells."""
        from rich.text import Text

        rows = list(self._shown(column))
        arrow = _ARROWS[rows[0].higher_is_better] if rows else ""
        task, metric, chosen = map(printable, column)
        head = Text(task, "bold", overflow="fold")
        head.append(f"\n{metric}{arrow}" + ("" if chosen == "none" else f"\n{chosen}"), "not bold")
        best = best_value(rows)
        found = [self._rows.get((subject, column)) for subject in self.subjects]
        cells = [Text() if row is None else self._cell(row, best) for row in found]
        return _Cells(head, tuple(cells), max(_width(*cells), min(_width(head), self._most)))

    def _cell(self, row: Row, best: float | None) -> Text:
        """A cell: value, difference from the baseline, and share of the gain recovered."""
        from rich.text import Text

        wins = best is not None and math.isclose(row.value, best, rel_tol=1e-9)
        notes = list(row.notes)
        cell = Text(overflow="fold")
        cell.append(number_text(row.value), "bold" if wins else "")
        cell.append("" if row.stderr is None else f" ± {number_text(row.stderr)}")
        if row.delta is not None:
            cell.append(f"\n{number_text(row.delta, '+')}")
            if row.p_value is not None:
                cell.append(f" {chance_text(row.p_value)}")
            else:
                # The comparison's note comes first; it has one if its p-value is missing.
                cell.append(self._marked(notes[:1]))
                notes = notes[1:]
        if row.recovered is not None:
            cell.append(f"\n{share_text(row.recovered, row.recovered_interval)}")
        cell.append(self._marked(notes))
        return cell

    def _marked(self, notes: Sequence[str]) -> str:
        numbers = sorted({self._marks[note] for note in notes})
        return "".join(f" {_superscript(number)}" for number in numbers)

    def remarks(self) -> Iterator[str]:
        """The lines below the table: notes, sample counts and the meaning of signs."""
        for note, number in self._marks.items():
            yield f"{_superscript(number)} {note}"
        yield f"n = {self._counts()}"
        yield from self._signs()

    def _counts(self) -> str:
        """The sample counts by task; tasks with equal counts are joined."""
        tasks: dict[str, list[str]] = {}
        for task in dict.fromkeys(task for task, _, _ in self._columns):
            counts = {row.n for row in self._shown() if row.task == task}
            if counts:
                span = dict.fromkeys(f"{count:,}" for count in (min(counts), max(counts)))
                tasks.setdefault(" to ".join(span), []).append(task)
        return ", ".join(f"{count} ({', '.join(names)})" for count, names in tasks.items())

    def _signs(self) -> Iterator[str]:
        rows = list(self._shown())
        if any(row.stderr is not None for row in rows):
            yield "± standard error"
        if any(row.delta is not None for row in rows):
            tested = any(row.p_value is not None for row in rows)
            yield f"+ and -: difference from {self._short[self._evaluation.baseline]}" + (
                "; p: McNemar's exact test or sign-flip permutation, paired" if tested else ""
            )
        if any(row.recovered is not None for row in rows):
            gain = f"{self._short[self._evaluation.finetuned or '']}'s gain over "
            interval = any(row.recovered_interval is not None for row in rows)
            yield f"recovers: share of {gain}{self._short[self._evaluation.target]}" + (
                ", 95 % bootstrap interval" if interval else ""
            )


def _table(width: int, names: Sequence[Text], columns: Sequence[_Cells]) -> Table:
    table = make_table(padding=(0, _GAP // 2, 0, _GAP // 2))
    table.add_column("model", overflow="fold", width=width)
    for column in columns:
        table.add_column(column.head, width=column.width)
    tall = any("\n" in cell.plain for column in columns for cell in column.cells)
    for number, name in enumerate(names):
        # A blank line separates models that take several lines.
        if tall:
            table.add_row()
        table.add_row(name, *(column.cells[number] for column in columns))
    return table


def _width(*texts: Text) -> int:
    """The width of the longest line, in terminal columns."""
    return max(line.cell_len for text in texts for line in text.split(allow_blank=True))


def _superscript(number: int) -> str:
    return str(number).translate(_SUPERSCRIPTS)
