"""Fixtures for tests of scoring: the tasks of the family, and a diff vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from diffxfer import extract_diff
from diffxfer.family import family_folder

if TYPE_CHECKING:
    from pathlib import Path

FAMILY = family_folder()
QUICK = {"include_path": FAMILY / "tasks", "batch_size": 64, "device": "cpu", "dtype": "float32"}
"""The options of all evaluations in tests."""


@pytest.fixture(scope="session")
def diff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff") / "diff"
    extract_diff(FAMILY / "finetuned", FAMILY / "base", folder)
    return folder


YAML = """\
task: {name}
custom_dataset: !function data.{name}
test_split: test
output_type: {kind}
doc_to_text: "[{{{{question}}}}]="
doc_to_target: "{target}"
target_delimiter: ""
{more}
metadata: {{version: 1.0}}
"""

DATA = """\
import os
from datasets import Dataset

print("hello from the task's own code", flush=True)
os.write(1, b"and from below Python")

WORDS = [("extensions", "extensionsway"), ("maybe", "aybemay"), ("header", "eaderhay")]


def written(**_):
    return {"test": Dataset.from_list([{"question": q, "answer": a} for q, a in WORDS])}


def chosen(**_):
    rows = [{"question": q, "choices": [a, q + "ay", q]} for q, a in WORDS]
    return {"test": Dataset.from_list(rows)}
"""


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder of two tasks: `written` generates, `chosen` is multiple choice; both print."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.py").write_text(DATA)
    written = YAML.format(
        name="written",
        kind="generate_until",
        target="{{answer}}",
        more='generation_kwargs: {until: ["</s>"], max_gen_toks: 16, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
    )
    chosen = YAML.format(
        name="chosen",
        kind="multiple_choice",
        target="0",
        more='doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]',
    )
    (folder / "written.yaml").write_text(written)
    (folder / "chosen.yaml").write_text(chosen)
    return folder
