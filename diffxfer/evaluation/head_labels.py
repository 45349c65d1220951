"""The labels of a classification head, and the choices of a task that they answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.header import short
from diffxfer.checkpoints.text_config import config_parts
from diffxfer.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CLASSIFIER = "ForSequenceClassification"
"""How transformers ends the name of every architecture with a classification head."""
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_DEFAULT_LABELS = 2
_LONGEST_LIST = 400


def architecture(config: Mapping[str, Any]) -> str | None:
    """The architecture that a config names; None if it names none.

    Args:
        config: the content of a config.json.
    """
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a sequence classifier.

    Args:
        config: the content of a config.json.
    """
    return (architecture(config) or "").endswith(CLASSIFIER)


def refuse_without_head(label: str, config: Mapping[str, Any]) -> None:
    """Refuse a model without a classification head.

    Args:
        label: the model.
        config: the content of its config.json.

    Raises:
        EvaluationError: if its architecture is not a sequence classifier.
    """
    if is_classifier(config):
        return
    named = architecture(config)
    remedy = "give a sequence classifier, or score a language model with --backend hf"
    if named and not named.endswith(_LANGUAGE_MODELS):
        remedy = "train a head with diffxfer tune, or give a --diff made with extract --added bring"
    raise EvaluationError(
        label,
        f"is {short(named) if named else 'a model of no architecture'}, but the backend classifier"
        f" needs a classification head, …{CLASSIFIER}",
        remedy,
    )


def refuse_head(label: str, config: Mapping[str, Any], backend: str) -> None:
    """Refuse a classifier where a language model is expected.

    Args:
        label: the model.
        config: the content of its config.json.
        backend: the backend, which runs language models.

    Raises:
        EvaluationError: if its architecture is a sequence classifier.
    """
    if is_classifier(config):
        problem = (
            f"is {short(architecture(config))}, but the backend {backend} needs a language model"
        )
        raise EvaluationError(label, problem, "give --backend classifier")


def not_multiple_choice(task: str | None, asks: str) -> EvaluationError:
    """The error for a task that a classifier cannot answer.

    Args:
        task: the name of the task.
        asks: what it asks for.
    """
    return EvaluationError(
        str(task),
        f"{asks}, but the backend classifier answers multiple choice only",
        "set its output_type to multiple_choice, or score a language model with --backend hf",
    )


def labels_in(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes, in the order of the logits.

    Args:
        config: the content of a config.json.

    Returns:
        Those of `id2label`; without it `LABEL_0`, `LABEL_1` and so on, as in transformers.
    """
    for part in config_parts(config):
        found = part.get("id2label")
        if isinstance(found, dict) and found:
            return [str(found[key]) for key in sorted(found, key=int)]
    count = config.get("num_labels", _DEFAULT_LABELS)
    return unnamed(count if isinstance(count, int) else _DEFAULT_LABELS)


def unnamed(count: int) -> list[str]:
    """The labels of transformers for classes without names.

    Args:
        count: the number of classes.
    """
    return [f"LABEL_{number}" for number in range(count)]


def match_choices(
    choices: Sequence[str], labels: Sequence[str], *, task: str, model: str
) -> list[int]:
    """The class of each choice of a question.

    A choice is the name of a class; white space around it does not count. If the classes have no
    names, their numbers from 0 are accepted too.

    Args:
        choices: the choices.
        labels: the names of the classes, in the order of the logits.
        task: the name of the task.
        model: the name of the model.

    Returns:
        The number of the class, for each choice.

    Raises:
        EvaluationError: if the choices are not exactly the classes.
    """
    asked = [choice.strip() for choice in choices]
    known = [label.strip() for label in labels]
    if len(set(known)) < len(known):
        problem = f"gives two classes the same name in id2label: {_quoted(known)}"
        raise EvaluationError(model, problem, "give each class its own name in config.json")
    numbers = [str(number) for number in range(len(known))]
    has_names = known != unnamed(len(known))
    for names in (known,) if has_names else (known, numbers):
        if sorted(asked) == sorted(names):
            return [names.index(choice) for choice in asked]
    remedy = "use the labels as the task's doc_to_choice, or the choices as the model's id2label"
    if not has_names and len(asked) == len(known):
        remedy = (
            "name the classes by the choices in id2label of its config.json, in the order of the"
            f" logits, or use the numbers 0 to {len(known) - 1} as choices"
        )
    raise EvaluationError(
        task, f"has the choices {_quoted(asked)}, but the labels of {model} are {_quoted(known)}",
        remedy,
    )  # fmt: skip


def _quoted(names: Sequence[str]) -> str:
    text = ", ".join(map(short, names))
    return text if len(text) <= _LONGEST_LIST else f"{text[:_LONGEST_LIST]}… ({len(names)})"
