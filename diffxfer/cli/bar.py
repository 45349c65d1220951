"""The progress bar: description, progress, speed and time left.

Imported only if the output is watched on a terminal.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, ConsoleDimensions
from rich.progress import (
    DownloadColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from diffxfer.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

BYTES = "bytes"
_GAP = 2
_WIDEST_BAR, _NARROWEST_BAR = 40, 8


class Bar:
    """A bar at the bottom of a terminal, erased when it stops; lines are printed above it.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        console = _Terminal(file=stream, highlight=False, markup=False, emoji=False)
        self._progress = _OneLine(
            console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._progress.add_task("", total=None, unit="", more="")
        self._now: tuple[str, str] = "", ""
        self._pace = Pace()
        self._progress.start()

    def begin(self, what: str) -> None:
        """Show an activity of unknown length."""
        self._now = what, ""
        self._progress.reset(self._task, description=what, unit="", more="")
        self._progress.tasks[0].total = None  # `reset` ignores None

    def show(self, what: str, done: int, total: int, unit: str, more: str = "") -> None:
        """Show the progress of an activity.

        Args:
            what: a description of the activity.
            done: the amount done.
            total: the total amount.
            unit: the unit: `BYTES`, or a noun.
            more: a short status text.
        """
        if (what, unit) != self._now or done < self._progress.tasks[0].completed:
            self._now = what, unit
            # Work that was already done at the start must not count for the speed.
            known = {"description": what, "total": total, "unit": unit, "more": more}
            self._progress.reset(self._task, completed=done, **known)  # type: ignore[arg-type]
            self._pace = Pace()
        self._pace.note(done, time.monotonic())
        speed, left_s = self._pace.speed, self._pace.left_s(total)
        self._progress.update(
            self._task, completed=done, total=total, more=more, speed=speed, left_s=left_s
        )

    def say(self, line: str) -> None:
        """Print a line above the bar, without cutting it."""
        self._progress.console.print(Text(line), soft_wrap=True)

    def stop(self) -> None:
        """Erase it."""
        self._progress.stop()


class Pace:
    """The speed of an activity, measured from the last moment before it progressed.

    A batch is done all at once, so its time begins at the end of the previous one.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last = 0, 0.0

    def note(self, done: int, at_s: float) -> None:
        """Record the amount done at a time."""
        if self._first is None or done <= self._first[0]:
            self._first = done, at_s
        self._last = done, at_s

    @property
    def speed(self) -> float | None:
        """The amount done per second; None if it is not known yet."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])

    def left_s(self, total: int) -> float | None:
        """The seconds left at that speed."""
        return (total - self._last[0]) / self.speed if self.speed else None


class _Terminal(Console):
    """A terminal that reports its own width, and whose cursor stays visible.

    rich asks stdin, stdout and stderr for the width, but these may be files here. A process that
    is killed cannot show a hidden cursor again.
    """

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines."""
        try:
            found = os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError):
            return super().size
        if "COLUMNS" in os.environ or not found.columns:
            return super().size
        return ConsoleDimensions(found.columns, found.lines)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        raise NotImplementedError

    def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002 rich gives it
        """Do not change the cursor."""
        return False


class _OneLine(Progress):
    """A line that fits the terminal: a description that is too long loses its end."""

    def get_renderables(self) -> Iterable[Table]:
        """The line of each task."""
        for task in self.tasks:
            yield self._line(task)

    def _line(self, task: Task) -> Table:
        what = Text(printable(task.description))
        # Leave space for the ^C that a terminal echoes: a wrapped line is not erased completely.
        most = self.console.width - len(" ^C") - _NARROWEST_BAR - 2 * _GAP
        figures = _figures(task, whole=True)
        if what.cell_len + figures.cell_len > most:
            figures = _figures(task, whole=False)
        room = most - figures.cell_len
        what.truncate(max(room, 0), overflow="ellipsis")
        bar = min(_WIDEST_BAR, _NARROWEST_BAR + room - what.cell_len) if room >= 0 else 0
        cells: list[Any] = [what] if what.cell_len else []
        cells += [_drawn(task, bar)] if bar else []
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        for _ in range(len(cells) + 1):
            grid.add_column(no_wrap=True)
        grid.add_row(*cells, figures)
        return grid


def _drawn(task: Task, width: int) -> ProgressBar:
    known = task.total is not None
    return ProgressBar(
        total=max(1, task.total or 0) if known else None,
        completed=max(0, task.completed),
        width=width,
        pulse=not known,
        animation_time=task.get_time(),
    )


def _figures(task: Task, *, whole: bool) -> Text:
    """Count, speed and time left; if nothing is counted, the time elapsed."""
    if task.total is None:
        return Text(_clock(task.elapsed or 0.0))
    if task.fields["unit"] == BYTES:
        columns = (TaskProgressColumn, DownloadColumn, TransferSpeedColumn, TimeRemainingColumn)
        return Text(" ").join(Text.assemble(column().render(task)) for column in columns)
    unit = f" {task.fields['unit']}" if whole else ""
    parts = [f"{int(task.completed):,}/{int(task.total):,}{unit}"]
    parts += [task.fields["more"]] if task.fields["more"] else []
    speed, left_s = task.fields.get("speed"), task.fields.get("left_s")
    parts += [f"{_number(speed)}/s"] if speed else []
    parts += [f"{_clock(left_s)} left"] if left_s is not None else []
    return Text("  ".join(parts))


def _number(speed: float) -> str:
    """A speed with three digits."""
    return f"{speed:.2f}" if speed < 10 else f"{speed:.1f}" if speed < 100 else f"{speed:,.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
