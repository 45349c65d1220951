"""Repeat the setting of Qin et al. 2023 in small: encoders, classifiers, four arms.

A tiny RoBERTa of random weights reads the docstrings of Python's standard library (`m1`), and goes
on with those of torch (`m2`), transformers (`m3`) and other packages (`m4`), by `diffxfer tune
--objective mlm`. The task is to tell which of seven other packages a docstring is from. The
classifier of `m1`, tuned on all rows, is recycled for the later bases by `diffxfer iterate`: as
the start of tuning, as its teacher, and as both, on 32 rows of each label and on all of them.

    $ python examples/encoders/run_encoders.py work

It takes about a quarter of an hour on two cores and writes all it makes to WORK; if it is
interrupted, the same command continues. All scores go to WORK/results.json; the tables are
Markdown. Seeds are fixed, but other releases of the packages, of Python or of torch, or another
CPU, give slightly other figures.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from transformers.utils import logging

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where train_family is

from arm_tables import tables
from first_model import TOKENS, make_first_model
from texts import CLASSES, KINDS, labelled, pieces, read_packages, write_rows, write_task

from diffxfer import iterate, tune

FEW, ALL = "few", "all"
FIRST = "all-m2"
ARMS = ["direct", "initialised", "distilled"]
"""The controls of the recipes: with the tuned graft, which has the teacher too, the four arms."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much of everything there is.

    Attributes:
        words: the size of the vocabulary.
        reading: by base, steps of masked-language training after the base before it.
        rows: by name, how many rows of each label there are to train on.
        steps: by name, steps of tuning on these rows.
        short_steps: fewer steps on all rows, to see which start learns faster.
        questions: texts of each label that are asked about.
        seeds: of the rows that are drawn, their order, and the new heads.
    """

    words: int = 2000
    reading: tuple[int, ...] = (1000, 400, 400, 400)
    rows: tuple[tuple[str, int], ...] = ((FEW, 32), (ALL, 700))
    steps: tuple[tuple[str, int], ...] = ((FEW, 80), (ALL, 300))
    short_steps: tuple[int, ...] = (75,)
    questions: int = 120
    seeds: tuple[int, ...] = (0, 1, 2)


def prepare(work: Path, plan: Plan, kinds: Mapping[str, Sequence[str]], task: Any) -> None:
    """Write the texts, the task and the first model; nothing is done if they are there.

    Args:
        work: the folder of the run.
        plan: how much of everything.
        kinds: what each base reads.
        task: the prose of docstrings by label.
    """
    work.mkdir(parents=True, exist_ok=True)
    for base, texts in kinds.items():
        write_rows(work / f"{base}.jsonl", [{"text": text} for text in texts])
    counts = dict(plan.rows)
    write_task(work / "task", task, asked=plan.questions, counts=counts, seeds=plan.seeds)
    make_first_model(work / "m0", next(iter(kinds.values())), plan.words)


def read_on(work: Path, plan: Plan) -> None:
    """Train each base from the one before it."""
    before = "m0"
    for base, steps in zip(KINDS, plan.reading, strict=True):
        if not (work / base).exists():
            typer.echo(f"{base}: {steps} steps of masked-language training", err=True)
            tune(
                *(work / before, work / f"{base}.jsonl", work / base),
                objective="mlm",
                steps=steps,
                learning_rate=3e-3,
                batch_size=32,
                max_length=TOKENS,
                device="cpu",
            )
        before = base


def recipe(work: Path, plan: Plan, bases: Sequence[str], rows: str, seed: int) -> Row:
    """Return a recipe of `diffxfer iterate` whose rounds after the first have four arms."""
    return {
        "bases": [str(work / base) for base in bases],
        "train": {
            "data": str(work / "task" / f"{rows}-{seed}.jsonl"),
            "objective": "classification",
            "steps": dict(plan.steps)[rows],
            "learning_rate": 3e-3,
            "batch_size": 32,
            "max_length": TOKENS,
            "seed": seed,
            "device": "cpu",
            "teacher": "previous",
        },
        "eval": {
            "tasks": ["package"],
            "include_path": str(work / "task"),
            "backend": "classifier",
            "batch_size": 64,
            "device": "cpu",
        },
        "controls": ARMS,
    }


def recipes(work: Path, plan: Plan, seed: int) -> dict[str, Row]:
    """Return the recipes of one seed by name.

    Round 1 of the first makes the outdated classifier, of `m1` and all rows; the others start from
    it.
    """
    bases = list(KINDS)
    first, second, *_, last = bases
    outdated = {"finetuned": str(work / f"seed-{seed}" / FIRST / "round-01" / "model")}
    found = {FIRST: recipe(work, plan, [first, second], ALL, seed)}
    for name, chained, rows in (
        ("all-m4", [first, last], ALL),
        ("few-m4", [first, last], FEW),
        # Each round's teacher and diff vector are those of the round before.
        ("few-chain", bases, FEW),
    ):
        found[name] = recipe(work, plan, chained, rows, seed) | outdated
    for steps in plan.short_steps:
        short = recipe(work, plan, [first, second], ALL, seed) | outdated
        found[f"{FIRST}-{steps}"] = short | {"train": short["train"] | {"steps": steps}}
    return found


def follow(work: Path, plan: Plan, job: tuple[int, str]) -> list[Row]:
    """Run the recipe of a seed and a name; return its scores."""
    seed, name = job
    home = work / f"seed-{seed}"
    home.mkdir(exist_ok=True)
    content = recipes(work, plan, seed)[name]
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    with redirect_stdout(sys.stderr):
        report = iterate(path, home / name)
    typer.echo(f"done: seed {seed}, {name}", err=True)
    known = {"run": name, "seed": seed, "steps": content["train"]["steps"]}
    return [
        known
        | {"round": each.number, "base": each.base, "stage": stage}
        | {key: score[key] for key in ("value", "stderr", "n", "baseline", "p_value")}
        for each in report.rounds
        for stage, (score,) in each.scores.items()
    ]


def run(
    work: Path,
    plan: Plan,
    kinds: Mapping[str, Sequence[str]],
    task: Mapping[str, Sequence[str]],
    workers: int,
) -> list[Row]:
    """Train the bases, run every recipe, and write and return every score.

    Args:
        work: the folder for all of it.
        plan: how much of everything.
        kinds: what each base reads.
        task: the prose of docstrings by label.
        workers: processes that run recipes at the same time, each on one thread.
    """
    # Then sums come in the same order on every number of cores.
    torch.set_num_threads(1)
    prepare(work, plan, kinds, task)
    read_on(work, plan)
    names = list(recipes(work, plan, 0))
    parts = [[(seed, FIRST) for seed in plan.seeds]]
    parts += [[(seed, name) for name in names if name != FIRST for seed in plan.seeds]]
    each = partial(follow, work, plan)
    if workers == 1:
        found = [each(job) for part in parts for job in part]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            found = [scores for part in parts for scores in list(pool.map(each, part))]
    rows = [row for scores in found for row in scores]
    (work / "results.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")
    return rows


def main(
    work: Path,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = os.cpu_count() or 1,
) -> None:
    """Repeat the setting in WORK, a folder that is made or continued, and print its tables."""
    began = time.perf_counter()
    # These models are so small that threads would only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kinds = {base: pieces(read_packages(names)) for base, names in KINDS.items()}
    task = labelled({name: read_packages([name]) for name in CLASSES})
    rows = run(work.absolute(), Plan(), kinds, task, workers)
    typer.echo(f"{(time.perf_counter() - began) / 60:.0f} minutes", err=True)
    typer.echo(tables(rows))


if __name__ == "__main__":
    typer.run(main)
