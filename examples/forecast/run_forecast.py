"""Measure how much of direct fine-tuning grafts recover, and hold the forecast against it.

Five families of tiny models are trained from nothing: for each a base, two fine-tunes, targets that
were trained further or made by arithmetic, and on each target the direct fine-tune. The rule of
`diffxfer.probing.forecast` is fixed on three families, and the other two show what it is worth.

    $ python examples/forecast/run_forecast.py work

Models and settings that are in the folder already are kept, so that a run can be cut off at any
time. `measurements.json`, `settings.md` and `scatter.svg` are written at the end.
"""

import json
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from copy import deepcopy
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # train_family.py

import torch
import typer
from families import FAMILIES, Family, FineTune, new_model, tokenizer_of
from measuring import activations, distances, graft_scores, recovery
from reporting import write_reports
from safetensors.torch import load_file, save_file
from targets import (
    LINES,
    NOISES,
    ON_FIRST,
    ON_SECOND,
    TRAINED,
    UNRELATED,
    moved,
    noisy,
    permuted,
)
from tasks import task_rows, words_of
from train_family import docstrings, package_docstrings
from training import echoes, padded, score, task_batches, text_ids, train, windows

from diffxfer.probing.activations import shipped_text

BASE_STEPS, UNRELATED_STEPS, CHARACTERS = 1100, 350, 1_500_000
BASE_RATE = 4e-3
ROW_TOKENS = 48
LEAST_GAIN = 20.0


def corpora(folder: Path) -> dict[str, list[str]]:
    """Return what base reads, and the two texts that targets read: docstrings and code.

    They are gathered once, and kept in the folder.
    """
    path = folder / "texts.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(gathered()))
    texts: dict[str, list[str]] = json.loads(path.read_text("utf-8"))
    return texts


def replace(path: Path, text: str) -> None:
    """Write a file at once: whoever reads it finds it whole."""
    unfinished = path.with_suffix(f".unfinished-{os.getpid()}")
    unfinished.write_text(text, "utf-8")
    unfinished.rename(path)


def gathered() -> dict[str, list[str]]:
    """Gather the texts from the standard library and from packages."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    code = sorted((Path(spec.origin).parent / "models").glob("[a-d]*/modeling_*.py"))
    return {
        "base": docstrings(Path(sysconfig.get_path("stdlib"))),
        "docs": [text for name in ("torch", "numpy") for text in package_docstrings(name)],
        "code": [path.read_text("utf-8")[2000:] for path in islice(code, 60)],
    }


class Workshop:
    """A family's models, made when they are asked for and kept in a folder."""

    def __init__(self, family: Family, folder: Path, texts: dict[str, list[str]]) -> None:
        self.family, self.folder = family, folder
        self.words = words_of(texts["base"])
        self.tokenizer = tokenizer_of(family, texts["base"][:1500])
        self.ids = {
            name: text_ids(each, self.tokenizer, CHARACTERS) for name, each in texts.items()
        }
        self.ids["echoes"] = text_ids([echoes(self.words, 600_000)], self.tokenizer, 600_000)
        ids = self.tokenizer.encode(shipped_text())
        self.rows = [ids[i : i + ROW_TOKENS] for i in range(0, len(ids), ROW_TOKENS)]
        self.tasks = {
            tune.task: [padded(rows, self.tokenizer) for rows in task_rows(tune.task, self.words)]
            for tune in family.tunes
        }

    def model(self, name: str) -> Any:
        """Return a member of the family; it is made unless its file is there."""
        path = self.folder / f"{name.replace(' ', '-')}.safetensors"
        model = new_model(self.family, len(self.tokenizer), 0)
        if not path.exists():
            typer.echo(f"  {self.family.name}: {name}")
            made = self._make(name)
            unfinished = path.with_suffix(f".unfinished-{os.getpid()}")
            self.folder.mkdir(parents=True, exist_ok=True)
            state = {key: each.detach().contiguous() for key, each in made.named_parameters()}
            save_file(state, unfinished)
            unfinished.rename(path)
        model.load_state_dict(load_file(path), strict=False)
        model.tie_weights()
        return model.eval()

    def _make(self, name: str) -> Any:
        if name in ("base", UNRELATED):
            # What is unrelated begins elsewhere, and reads in another order.
            other = name == UNRELATED
            model = new_model(self.family, len(self.tokenizer), 11 if other else 0)
            text = self.ids["docs" if other else "base"]
            batches = windows([text, text, self.ids["echoes"]], 12 if other else 1)
            steps = UNRELATED_STEPS if other else BASE_STEPS
            train(model, batches, steps=steps, rate=BASE_RATE, tell=typer.echo)
            return model
        model = self.model("base")
        if name in TRAINED:
            steps, share, read = TRAINED[name]
            batches = windows([self.ids[read]], 3)
            train(model, batches, steps=steps, rate=self.family.rate * share, tell=typer.echo)
        elif name in LINES:
            end, k = LINES[name]
            state = moved(model.state_dict(), self.model(end).state_dict(), k)
            model.load_state_dict(state)
        elif name in NOISES:
            model.load_state_dict(noisy(dict(model.named_parameters()), NOISES[name]), strict=False)
        elif name.startswith("permuted"):
            model = permuted(model, 1 if name.endswith("layer") else None)
        else:
            (tune,) = (tune for tune in self.family.tunes if tune.task == name)
            model = self.tuned(model, tune, 2)
        return model

    def tuned(self, start: Any, tune: FineTune, seed: int) -> Any:
        """Return a copy of a model that learned a task."""
        model = deepcopy(start)
        batches = task_batches(self.tasks[tune.task][0], seed)
        train(model, batches, steps=tune.steps, rate=tune.rate)
        return model


def setting(shop: Workshop, tune: FineTune, name: str) -> dict[str, Any]:
    """Train the direct fine-tune of a target, grade the grafts, and measure the distances."""
    _, chosen_on, graded_on = shop.tasks[tune.task]
    base, finetuned, target = (shop.model(each) for each in ("base", tune.task, name))
    scores: dict[str, Any] = {
        "finetuned": score(finetuned, graded_on),
        "target": score(target, graded_on),
        "direct": score(shop.tuned(target, tune, 4), graded_on),
        **graft_scores(base, finetuned, target, chosen_on, graded_on),
    }
    enough = scores["direct"] - scores["target"] >= LEAST_GAIN
    return {
        "family": shop.family.name,
        "held_out": shop.family.held_out,
        "task": tune.task,
        "target_name": name,
        **scores,
        "recovery": recovery(scores) if enough else None,
        **distances(base, finetuned, target),
        **activations(base, target, shop.rows),
    }


def measure(
    family: Family, folder: Path, texts: dict[str, list[str]], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the settings of a family for some of its tasks; those in the folder are kept."""
    shop = Workshop(family, folder, texts)
    done = []
    for tune, names in zip(family.tunes, (ON_FIRST, ON_SECOND), strict=True):
        for name in names if tune.task in tasks else ():
            path = folder / f"{tune.task} on {name}.json".replace(" ", "-")
            if not path.exists():
                row = setting(shop, tune, name)
                typer.echo(line(row))
                replace(path, json.dumps(row))
            done.append(json.loads(path.read_text("utf-8")))
    return done


def line(row: dict[str, Any]) -> str:
    """Return a setting in a line."""
    share = "skipped" if row["recovery"] is None else f"{row['recovery']:.0f} %"
    return (
        f"{row['family']} | {row['task']} | {row['target_name']}: weights {row['weight_ratio']:.2f}"
        f", activations {row['activation_ratio']:.3f}; target {row['target']:.0f}, direct "
        f"{row['direct']:.0f}, graft {row['graft']:.0f} at {row['alpha']}: {share}"
    )


def main(
    folder: Path,
    only: Annotated[
        str,
        typer.Option(
            "--only", help="Families, or families and tasks as in 'gpt2-64/plural', by commas."
        ),
    ] = "",
) -> None:
    """Make in FOLDER what it lacks, then fit the rule and write the tables.

    With `--only`, several processes may work in one folder; the last run has no `--only`.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    wanted = only.split(",") if only else [family.name for family in FAMILIES]
    texts, rows = corpora(folder), []
    for family in FAMILIES:
        tasks = [
            tune.task
            for tune in family.tunes
            if {family.name, f"{family.name}/{tune.task}"} & set(wanted)
        ]
        if tasks:
            rows += measure(family, folder / family.name, texts, tasks)
    typer.echo(f"{len(rows)} settings; {(time.process_time() - started) / 60:.1f} CPU minutes now")
    if not only:
        write_reports(rows, folder)


if __name__ == "__main__":
    typer.run(main)
