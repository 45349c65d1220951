"""The labels of a classifier, and those of training rows as numbers of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.text_config import config_parts
from diffxfer.errors import DataError, TrainingError, VocabularyError, listed
from diffxfer.recycling.objectives import model_kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.training_data import TrainingRows

_SINGLE = "single_label_classification"
_LAST_LAYER = re.compile(
    r"(?:^|\.)(?:classifier|classifier\.out_proj|classification_head\.out_proj|score|logits_proj)"
    r"\.weight$"
)


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a classifier.

    Attributes:
        names: their names; the position of a name is the number of the label.
        rows: the number of the label of each training row.
        new: whether the classification head is new, so that the result's config needs the labels.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    new: bool

    @property
    def config(self) -> dict[str, Any]:
        """The labels as settings of a config.json."""
        return {
            "id2label": {str(number): name for number, name in enumerate(self.names)},
            "label2id": {name: number for number, name in enumerate(self.names)},
            "num_labels": len(self.names),
            "problem_type": _SINGLE,
        }


def prepare_labels(model: Checkpoint, teacher: Checkpoint | None, rows: TrainingRows) -> Labels:
    """Check the labels of the model, the teacher and the rows against each other.

    A new head has the labels of the teacher, or else those of the rows: names in their sorted
    order, and numbers as they are.

    Args:
        model: the model to train: a classifier, or a model that gets a new head.
        teacher: the classifier to learn from.
        rows: the training rows, with labels.

    Raises:
        DataError: if the labels of the rows are not those of the model or of the teacher.
        TrainingError: if a model predicts something else than one of several labels.
        VocabularyError: if the teacher has other labels.
    """
    new = model_kind(model.config) != "classifier"
    own = None if new else read_labels(model)
    taught = None if teacher is None else read_labels(teacher)
    if teacher is not None and own is not None and taught is not None and own != taught:
        problem = f"has the labels {_list(taught)}, but the model to train has {_list(own)}"
        raise VocabularyError(teacher.folder, problem, "give a teacher with the same labels")
    known = own or taught
    if known is None:
        names = _new_names(rows)
    else:
        owner = model if own is not None else teacher
        assert owner is not None
        names = known
        _refuse_unknown(rows, names, str(owner.folder))
    numbers = {name: number for number, name in enumerate(names)}
    given = rows.columns["label"]
    return Labels(names, tuple(x if isinstance(x, int) else numbers[x] for x in given), new)


def read_labels(classifier: Checkpoint) -> tuple[str, ...]:
    """The labels of a classifier, in the order of its logits.

    Args:
        classifier: the model.

    Raises:
        TrainingError: if it does not predict one of several labels, or its head has another size.
    """
    folder, config = classifier.folder, classifier.config
    kind = config.get("problem_type")
    if kind not in (None, _SINGLE):
        problem = f"is a classifier of problem_type {kind!r}, expected {_SINGLE!r}"
        raise TrainingError(folder, problem, "give a classifier that predicts one label")
    names = _names(config, classifier)
    if len(names) < 2:
        problem = "has one label, so it is a regression; expected a classifier of two or more"
        raise TrainingError(folder, problem, "give a classifier that predicts one label of several")
    for name, spec in classifier.tensors.items():
        if _LAST_LAYER.search(name) and spec.shape[:1] != (len(names),):
            problem = f"{name} is {spec.shape}, but config.json has {len(names)} labels:"
            raise TrainingError(
                folder, f"{problem} {_list(names)}", "correct id2label in config.json"
            )
    return names


def _names(config: Mapping[str, Any], classifier: Checkpoint) -> tuple[str, ...]:
    for part in config_parts(config):
        found = part.get("id2label")
        if isinstance(found, dict) and found:
            numbered = {str(key): str(name) for key, name in found.items()}
            expected = [str(number) for number in range(len(numbered))]
            if sorted(numbered) != sorted(expected) or len({*numbered.values()}) < len(numbered):
                problem = "has an id2label that does not give each number from 0 on its own label"
                raise TrainingError(
                    classifier.folder, problem, "correct id2label and label2id in config.json"
                )
            return tuple(numbered[number] for number in expected)
    count = config.get("num_labels")
    # transformers does not store two labels of these names.
    return _numbered(count if isinstance(count, int) and not isinstance(count, bool) else 2)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))


def _new_names(rows: TrainingRows) -> tuple[str, ...]:
    given = set(rows.columns["label"])
    if len(given) < 2:
        problem = f"has only one label, {next(iter(given))!r}"
        raise DataError(rows.name, problem, "give rows of two labels or more")
    if isinstance(next(iter(given)), str):
        return tuple(sorted(given))
    # A label of no row is more likely a label of 1 that means the first than a label to come.
    lacking = next(number for number in range(len(given) + 1) if number not in given)
    if lacking < max(given):
        problem = f"has labels up to {max(given)}, but none is {lacking}"
        raise DataError(rows.name, problem, "number the labels from 0 on, or give names")
    return _numbered(len(given))


def _refuse_unknown(rows: TrainingRows, names: Sequence[str], owner: str) -> None:
    known = range(len(names)) if isinstance(rows.columns["label"][0], int) else names
    unknown = sorted({label for label in rows.columns["label"] if label not in known})
    if unknown:
        labels = sorted({*rows.columns["label"]})
        problem = (
            f"has the labels {_list(labels)}, of which {owner} lacks {_list(unknown)}: it has"
            f" {_list(names)}"
        )
        raise DataError(rows.name, problem, "give rows with its labels")


def _list(labels: Sequence[object]) -> str:
    return listed([repr(label) for label in labels])
