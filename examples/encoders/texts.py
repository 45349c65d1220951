"""The texts of the example: what the encoders read, and the task, a docstring's package."""

import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from train_family import docstrings, package_docstrings

KINDS = {
    "m1": ("stdlib",),
    "m2": ("torch",),
    "m3": ("transformers",),
    "m4": ("datasets", "trl", "peft", "accelerate", "lm_eval", "huggingface_hub"),
}
"""By base, the packages whose docstrings it reads after what the base before it has read."""
CLASSES = ("networkx", "nltk", "numpy", "pandas", "scipy", "sklearn", "sympy")
"""The labels of the task; no base reads these packages."""
WORDS_A_ROW = 36
_NAMES = re.compile(r"\b(networkx|nx|nltk|numpy|np|pandas|pd|scipy|sklearn|scikit|sympy)\b", re.I)
# What follows the prose of a docstring: an example, a field, a directive, or a section.
_AFTER_PROSE = re.compile(r"^\s*(>>>|:\w+|@\w+|\.\. |[-=~]{3,}|\w+:\s*$|\w+\n\s*[-=~]{3,})", re.M)


def read_packages(names: Iterable[str]) -> list[str]:
    """Return the docstrings of packages; `stdlib` stands for Python's standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    return [
        text
        for name in names
        for text in (docstrings(stdlib) if name == "stdlib" else package_docstrings(name))
    ]


def pieces(texts: Iterable[str]) -> list[str]:
    """Return pieces of some 36 words, without repetitions, in random order."""
    found: dict[str, None] = {}
    for text in texts:
        words = text.split()
        for start in range(0, len(words), WORDS_A_ROW):
            piece = " ".join(words[start : start + WORDS_A_ROW])
            if len(piece) >= 80:
                found[piece] = None
    shuffled = list(found)
    random.Random(0).shuffle(shuffled)
    return shuffled


def prose(text: str) -> str:
    """Return the prose that a docstring begins with, on one line."""
    return " ".join(_AFTER_PROSE.split(text, maxsplit=1)[0].split())


def labelled(texts: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Return the prose of docstrings by label, in random order.

    Prose that names one of the packages is left out, and prose that two of them share.
    """
    found = {
        label: {p for p in map(prose, given) if len(p) >= 60 and not _NAMES.search(p)}
        for label, given in texts.items()
    }
    count = Counter(p for given in found.values() for p in given)
    own = {label: sorted(p for p in given if count[p] == 1) for label, given in found.items()}
    for given in own.values():
        random.Random(0).shuffle(given)
    return own


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def write_task(
    folder: Path,
    texts: Mapping[str, Sequence[str]],
    *,
    asked: int,
    counts: Mapping[str, int],
    seeds: Iterable[int],
) -> None:
    """Write the task for lm-eval, and rows to train on, drawn anew for each seed.

    Args:
        folder: where they go.
        texts: the prose of docstrings by label.
        asked: texts of each label that are asked about, and never trained on.
        counts: by name, how many texts of each label there are to train on.
        seeds: of the draws; the smaller counts are the first rows of the larger ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": t, "label": name} for name, given in texts.items() for t in given[:asked]]
    write_rows(folder / "questions.jsonl", rows)
    (folder / "package.yaml").write_text(
        "task: package\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / 'questions.jsonl'))}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: text\n"
        "doc_to_target: label\n"
        f"doc_to_choice: [{', '.join(texts)}]\n"
        "metric_list: [{metric: acc}]\n",
        "utf-8",
    )
    for seed in seeds:
        draw = random.Random(seed)
        drawn = {
            name: draw.sample(given[asked:], max(counts.values())) for name, given in texts.items()
        }
        for name, count in counts.items():
            rows = [{"text": t, "label": label} for label, d in drawn.items() for t in d[:count]]
            draw.shuffle(rows)
            write_rows(folder / f"{name}-{seed}.jsonl", rows)
