"""Follow a family through four bases, and see what recycling its fine-tuning is worth.

A tiny Llama reads the docstrings of Python's standard library, and is saved four times on the way,
first after very little: `m1`, `m2`, `m3`, `m4`. On each, three budgets of tuning teach it to write
words in Pig Latin, plainly and from a graft, in both modes of `diffxfer iterate`, three times over
with other rows in another order. Then the last base has 32 rows alone to learn from, with and
without a teacher.

    $ python examples/chain/run_chain.py work

It takes about a quarter of an hour on two cores and writes all it makes to WORK; if it is cut off,
the same command goes on. The tables are Markdown; `--json` prints every single score instead. Seeds
are fixed, but other releases of Python or torch, or another CPU, train slightly other models.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from transformers.utils import logging

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where train_family is

from bases import make_bases
from tables import ARMS, TASKS, chain_table, few_table
from train_family import (
    SEED,
    VOWEL,
    docstrings,
    pig_latin,
)

from diffxfer import evaluate, iterate, tune
from diffxfer.family import family_folder

FEW = 32
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much of everything there is.

    Attributes:
        stages: by how many steps of pretraining each base is older than the one before.
        budgets: steps of tuning in a round; each is a chain of its own.
        seeds: of the rows that are drawn, and of their order.
        rows: to train on.
        questions: unseen words that are asked about.
        few_steps: steps of tuning on 32 rows.
    """

    stages: tuple[int, ...] = (60, 150, 250, 400)
    budgets: tuple[int, ...] = (60, 120, 240)
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 1500
    questions: int = 300
    few_steps: int = 60

    @property
    def bases(self) -> list[str]:
        """Their names, oldest first."""
        return [f"m{number}" for number in range(1, len(self.stages) + 1)]


def prepare(work: Path, plan: Plan, texts: Sequence[str]) -> None:
    """Write the questions and the unseen text, and rows for each seed."""
    words = sorted({w for t in texts for w in re.findall(r"\b[a-z]{4,6}\b", t) if VOWEL.search(w)})
    asked = random.Random(SEED).sample(words, plan.questions)
    # "wafter" and "after" have the same answer: no answer may have been seen either.
    answers = set(map(pig_latin, asked))
    others = [word for word in words if pig_latin(word) not in answers]
    work.mkdir(parents=True, exist_ok=True)
    # The tasks that come with the shipped family read two files beside their folder. Its text, the
    # docstrings of another package, is unseen here too.
    shutil.copytree(family_folder() / "tasks", work / "tasks", dirs_exist_ok=True)
    shutil.copyfile(family_folder() / "text.txt", work / "text.txt")
    _write_rows(work / "task.jsonl", asked, "question", "answer")
    for seed in plan.seeds:
        drawn = random.Random(seed).sample(others, plan.rows)
        for count, name in ((plan.rows, "all"), (FEW, "few")):
            _write_rows(work / f"{name}-{seed}.jsonl", drawn[:count], "prompt", "completion")


def _write_rows(path: Path, words: Sequence[str], asked: str, answered: str) -> None:
    form = "{}" if asked == "question" else "[{}]="
    rows = [{asked: form.format(word), answered: pig_latin(word)} for word in words]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def recipe(work: Path, plan: Plan, budget: int, seed: int, mode: str) -> Row:
    """Return a recipe of `diffxfer iterate`.

    Both modes have the same bases, M*1 and plainly tuned models: one of them tunes and scores those
    for both.
    """
    first = work / f"chain-{budget}-{seed}" / "iter" / "round-01" / "model"
    return {
        "bases": [str(work / "bases" / name) for name in plan.bases],
        **({"finetuned": str(first)} if mode == "dir" else {}),
        "mode": mode,
        "train": {"data": str(work / f"all-{seed}.jsonl"), "steps": budget, **_training(seed)},
        "eval": _scoring(work),
        "controls": ["base", "direct"] if mode == "dir" else [],
    }


def _training(seed: int) -> Row:
    # Measured on m4: at 1e-3 the same steps teach it nothing, at 6e-3 less.
    return {
        "learning_rate": 3e-3,
        "batch_size": 32,
        "max_length": 32,
        "seed": seed,
        "device": "cpu",
    }


def _scoring(work: Path) -> Row:
    return {
        "tasks": list(TASKS),
        "include_path": str(work / "tasks"),
        "batch_size": 100,
        "device": "cpu",
        "dtype": "float32",
    }


def follow(work: Path, plan: Plan, job: tuple[int, int]) -> list[Row]:
    """Follow the chain in both modes, with one budget and one seed; return its scores."""
    budget, seed = job
    rows: list[Row] = []
    for mode in ("iter", "dir"):
        run = work / f"chain-{budget}-{seed}"
        run.mkdir(exist_ok=True)
        path = run / f"{mode}.yaml"
        path.write_text(yaml.safe_dump(recipe(work, plan, budget, seed, mode), sort_keys=False))
        with redirect_stdout(sys.stderr):
            report = iterate(path, run / mode)
        for chained in report.rounds:
            known = {"part": "chain", "mode": mode, "steps": budget, "seed": seed}
            for stage, scores in chained.scores.items():
                rows += _rows({**known, "base": chained.base, "stage": stage}, scores)
                if (chained.number, stage, mode) == (1, "tuned", "dir"):
                    # M*1 is the first base, tuned plainly.
                    rows += _rows({**known, "base": chained.base, "stage": "direct"}, scores)
    typer.echo(f"done: {budget} steps a round, seed {seed}", err=True)
    return rows


def teach(work: Path, plan: Plan, seed: int) -> list[Row]:
    """Tune the last base on 32 rows, in the four arms of Qin et al. 2023; return their scores.

    The teacher is the base before, as it came out of its round of the chain with most steps.
    """
    chain = work / f"chain-{max(plan.budgets)}-{seed}" / "iter"
    last = len(plan.bases)
    teacher, graft = chain / f"round-{last - 1:02}" / "model", chain / f"round-{last:02}" / "graft"
    base = work / "bases" / plan.bases[-1]
    folder = work / f"few-{seed}"
    arms = {
        "plain": (base, None),
        "initialised": (graft, None),
        "distilled": (base, teacher),
        "both": (graft, teacher),
    }
    for arm, (start, guide) in arms.items():
        if not (folder / arm).exists():
            data, settings = work / f"few-{seed}.jsonl", _training(seed)
            tune(start, data, folder / arm, steps=plan.few_steps, teacher=guide, **settings)
    made = {"teacher": teacher, "graft": graft} | {arm: folder / arm for arm in arms}
    models = {arm: made[arm] for arm in ARMS}
    with redirect_stdout(sys.stderr):
        found = evaluate([*models.values()], output=folder / "scores", **_scoring(work))
    names = {str(path): name for name, path in models.items()}
    known = {"part": "few", "steps": plan.few_steps, "seed": seed, "base": plan.bases[-1]}
    rows: list[Row] = []
    for row in found.as_json()["rows"]:
        rows += _rows({**known, "stage": names[row["model"]]}, [row])
    typer.echo(f"done: 32 rows, seed {seed}", err=True)
    return rows


def _rows(known: Row, scores: Sequence[Row]) -> Iterator[Row]:
    for score in scores:
        yield known | {name: score[name] for name in ("task", "metric", "value", "stderr", "n")}


def run(work: Path, plan: Plan, texts: Sequence[str], workers: int) -> list[Row]:
    """Make the bases, follow every chain, tune on few rows; return every score.

    Args:
        work: the folder for all of it.
        plan: how much of everything.
        texts: what the bases read, and where words are taken from.
        workers: processes that follow chains at the same time, each on one thread.
    """
    prepare(work, plan, texts)
    make_bases(work / "bases", plan.stages, texts)
    jobs = [(budget, seed) for seed in plan.seeds for budget in sorted(plan.budgets, reverse=True)]
    chains, arms = partial(follow, work, plan), partial(teach, work, plan)
    if workers == 1:
        return [row for rows in (*map(chains, jobs), *map(arms, plan.seeds)) for row in rows]
    # These models are so small that threads would only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        found = [*pool.map(chains, jobs), *pool.map(arms, plan.seeds)]
    return [row for rows in found for row in rows]


def main(
    work: Path,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="every score as JSON")] = False,
) -> None:
    """Follow the chain in WORK, a folder that is made or continued, and print what it scores."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    texts = docstrings(Path(sysconfig.get_path("stdlib")))
    rows = run(work.absolute(), Plan(), texts, workers)
    if as_json:
        typer.echo(json.dumps({"rows": rows}, indent=1))
        return
    for task in TASKS:
        typer.echo(f"{chain_table(rows, task)}\n")
    typer.echo(few_table(rows))


if __name__ == "__main__":
    typer.run(main)
