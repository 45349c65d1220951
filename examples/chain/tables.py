"""What the chain came to, as tables in Markdown: means over seeds, with their standard error."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

Row = Mapping[str, Any]

STAGES = (
    ("direct", "dir", "tuned plainly"),
    ("graft", "iter", "graft, `iter`"),
    ("tuned", "iter", "graft tuned, `iter`"),
    ("graft", "dir", "graft, `dir`"),
    ("tuned", "dir", "graft tuned, `dir`"),
)
ARMS = ("teacher", "graft", "plain", "initialised", "distilled", "both")
TASKS = {"pig_latin": "right of the unseen words, in %", "docstrings": "bits per byte of text"}


def share(values: Sequence[float]) -> str:
    """Return percentages as `mean ± standard error of the mean`."""
    return _summed([100 * value for value in values], "{:.1f}")


def bits(values: Sequence[float]) -> str:
    """Return bits per byte as `mean ± standard error of the mean`."""
    return _summed(values, "{:.2f}")


def _summed(values: Sequence[float], form: str) -> str:
    """Seeds are the sample: training anew differs more than the questions of one model do."""
    if not values:
        return ""
    said = form.format(mean(values))
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    return f"{said} ± {form.format(error)}" if error else said


SHOWN: dict[str, Callable[[Sequence[float]], str]] = {"pig_latin": share, "docstrings": bits}


def chain_table(rows: Sequence[Row], task: str) -> str:
    """Return a table by steps a round and stage; its columns are the bases."""
    chained = [row for row in rows if row["part"] == "chain" and row["task"] == task]
    bases = sorted({row["base"] for row in chained})
    lines = [
        f"| steps a round | {TASKS[task]} | " + " | ".join(f"`{base}`" for base in bases) + " |",
        "|---" * (len(bases) + 2) + "|",
    ]

    def line(budget: int, said: str, wanted: Row) -> None:
        found = [
            [
                row["value"]
                for row in chained
                if row["base"] == base and wanted.items() <= row.items()
            ]
            for base in bases
        ]
        values = " | ".join(map(SHOWN[task], found))
        lines.append(f"| {budget} | {said} | {values} |")

    # The same model was scored beside every chain: once is enough, and its spread is none.
    line(0, "base alone", {"stage": "base"})
    for budget in sorted({row["steps"] for row in chained}):
        for stage, mode, said in STAGES:
            line(budget, said, {"steps": budget, "stage": stage, "mode": mode})
    return "\n".join(lines)


def few_table(rows: Sequence[Row]) -> str:
    """Return a table of the arms that had few rows to learn from."""
    few = [row for row in rows if row["part"] == "few"]
    lines = ["| arm | " + " | ".join(TASKS.values()) + " |", "|---|---|---|"]
    for arm in ARMS:
        values = [
            SHOWN[task]([row["value"] for row in few if (row["stage"], row["task"]) == (arm, task)])
            for task in TASKS
        ]
        lines.append(f"| {arm} | " + " | ".join(values) + " |")
    return "\n".join(lines)
