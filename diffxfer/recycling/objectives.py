"""What a checkpoint is trained to predict: the next token, masked tokens, or the label of a row.

The architecture that the config names and the keys of the rows decide, unless the user does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from diffxfer.errors import OptionError, TrainingError, VocabularyError
from diffxfer.recycling.training_data import LABELLED_FORMS, ROW_FORMS, TEXT_FORMS, Accepted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.recycling.training_data import TrainingRows

    Kind: TypeAlias = Literal["causal", "classifier", "masked", "bare", "other", "unknown"]

CAUSAL = "causal"
CLASSIFICATION = "classification"
MLM = "mlm"
OBJECTIVES = (CAUSAL, CLASSIFICATION, MLM)

_ENDINGS: dict[str, Kind] = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForSequenceClassification": "classifier",
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "Model": "bare",
}
_WORDS: dict[Kind, str] = {
    "causal": "a causal language model",
    "classifier": "a classifier",
    "masked": "a masked language model",
    "bare": "a bare model without a head",
    "other": "another kind of model",
    "unknown": "of an architecture that its config.json does not name",
}
_LEARNERS: dict[str, tuple[Kind, ...]] = {
    CLASSIFICATION: ("classifier", "masked", "bare", "unknown"),
    MLM: ("masked", "unknown"),
    CAUSAL: ("causal", "bare", "other", "unknown"),
}
"""The kinds of checkpoint that can be trained for each objective."""
_FITTING = {
    CLASSIFICATION: "a classifier, a masked language model or a bare encoder",
    MLM: "a masked language model",
    CAUSAL: "a causal language model",
}
_ACCEPTED = {
    CLASSIFICATION: Accepted(LABELLED_FORMS, "a classifier"),
    MLM: Accepted(TEXT_FORMS, "a masked language model"),
    CAUSAL: Accepted(ROW_FORMS),
}
_EITHER = Accepted((*LABELLED_FORMS, *TEXT_FORMS), "a masked language model")


def model_kind(config: Mapping[str, Any]) -> Kind:
    """What kind of model a checkpoint is, by the first architecture that its config names.

    Args:
        config: the content of its config.json.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str):
        return "unknown"
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), "other")


def check_objective(model: Checkpoint, objective: str | None) -> None:
    """Check that a model can be trained for an objective.

    Args:
        model: the model to train.
        objective: the one that the user gives; None if the model and the rows decide.

    Raises:
        TrainingError: if it cannot.
    """
    kind = model_kind(model.config)
    if objective is None or kind in _LEARNERS[objective]:
        return
    problem = f"{_say(model)}, expected {_FITTING[objective]} for --objective {objective}"
    raise TrainingError(model.folder, problem, "give another model, or another --objective")


def rows_accepted(
    model: Checkpoint, objective: str | None
) -> Callable[[Collection[str]], Accepted]:
    """Which formats of rows a model can be trained on.

    Args:
        model: the model to train.
        objective: the one that the user gives; None if the model and the rows decide.

    Returns:
        A function of the keys of the first row.

    Raises:
        TrainingError: when that function is called, if labelled rows are given to a model that
            does not learn from labels.
    """
    kind = model_kind(model.config)

    def accept(keys: Collection[str]) -> Accepted:
        if objective is not None:
            return _ACCEPTED[objective]
        if kind == "classifier":
            return _ACCEPTED[CLASSIFICATION]
        labelled = {"text", "label"} <= set(keys)
        if kind == "masked":
            return _EITHER
        if kind == "bare" and labelled:
            return _ACCEPTED[CLASSIFICATION]
        # Without this refusal, the labels would be ignored silently.
        if labelled and not any(set(form) <= set(keys) for form in ROW_FORMS[:2]):
            problem = f"{_say(model)}, but the rows have text and label, which train a classifier"
            remedy = f"give {_FITTING[CLASSIFICATION]}, or --objective causal to train on the text"
            raise TrainingError(model.folder, problem, remedy)
        return _ACCEPTED[CAUSAL]

    return accept


def choose_objective(model: Checkpoint, rows: TrainingRows, objective: str | None) -> str:
    """What a model is trained to predict.

    Args:
        model: the model to train.
        rows: the training rows.
        objective: the one that the user gives; None if the model and the rows decide.
    """
    if objective is not None:
        return objective
    if "label" in rows.columns:
        return CLASSIFICATION
    return MLM if model_kind(model.config) == "masked" else CAUSAL


def check_teacher_kind(teacher: Checkpoint, objective: str) -> None:
    """Check that a teacher predicts what the student is trained to predict.

    Args:
        teacher: the model to learn from.
        objective: what the student is trained to predict.

    Raises:
        VocabularyError: if it does not.
    """
    kind = model_kind(teacher.config)
    taught = _LEARNERS[objective]
    if objective == CLASSIFICATION:
        taught = ("classifier", "unknown")  # a new head could teach nothing
    if kind not in taught:
        expected = _FITTING[objective].partition(",")[0]
        problem = f"{_say(teacher)}, expected {expected}, since the objective is {objective}"
        raise VocabularyError(teacher.folder, problem, "give another teacher")


def check_known_objective(objective: str | None) -> None:
    """Check the value of the option.

    Args:
        objective: what the user gives.

    Raises:
        OptionError: if it is not the name of an objective.
    """
    if objective is not None and objective not in OBJECTIVES:
        raise OptionError(
            "--objective", f"{objective!r} is unknown", f"give one of {', '.join(OBJECTIVES)}"
        )


def _say(model: Checkpoint) -> str:
    kind = model_kind(model.config)
    named = "" if kind == "unknown" else f" ({model.config['architectures'][0]})"
    return f"is {_WORDS[kind]}{named}"
