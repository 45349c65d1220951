"""How often two models predict the same, on rows without labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal

from diffxfer.probing.forward_pass import (
    batches,
    longest_row,
    run,
    undisturbed,
    vocabulary,
    why_not,
)
from diffxfer.probing.shares import Share, share_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel

Kind = Literal["causal", "masked", "classifier"]

COUNTED = {
    "next_token": (
        "positions at which both models give the highest probability to the same next token, the "
        "text before being the same for both"
    ),
    "first_token": (
        "prompts after which both models give the highest probability to the same first token"
    ),
    "masked_token": "masked positions that both models fill with the same token",
    "label": "rows to which both models give the same label",
}
"""What each share is a share of."""

_PREDICTS = {"causal": "next token", "masked": "masked token", "classifier": "label"}

_LOGITS = 2**28
"""Bytes of logits for which a batch is made smaller."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often two models predict the same.

    Attributes:
        pair: the names of the models.
        kind: ``"causal"``, ``"masked"`` or ``"classifier"``.
        next_token: of a causal LM, positions with the same next token.
        first_token: of a causal LM, prompts with the same first token of an answer.
        masked_token: of a masked LM, masked positions with the same token.
        label: of a classifier, rows with the same label.
        rows: the number of rows that were compared.
        left_out: rows that were not: empty, longer than the models' positions, or without anything
            to count.
        reason: why the models cannot be compared, in words; the shares are None then.
    """

    pair: tuple[str, str]
    kind: Kind
    next_token: Share | None = None
    first_token: Share | None = None
    masked_token: Share | None = None
    label: Share | None = None
    rows: int = 0
    left_out: int = 0
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        shares = {name: getattr(self, name) for name in COUNTED}
        return {
            "pair": list(self.pair),
            "kind": self.kind,
            **{name: share and share.as_json() for name, share in shares.items()},
            "rows": self.rows,
            "left_out": self.left_out,
            "reason": self.reason,
        }


def compare_predictions(
    a: PreTrainedModel,
    b: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    names: tuple[str, str] = ("a", "b"),
    kind: Kind | None = None,
    scored: Sequence[Sequence[bool]] | None = None,
    mask_id: int | None = None,
    batch_size: int = 8,
) -> Agreement:
    """Count how often two models predict the same, on rows without labels. Nothing is generated.

    Args:
        a: a loaded model.
        b: another one of the same kind.
        rows: token ids of prompts, or of prompts with their completions.
        names: the names of the models, for the result.
        kind: ``"causal"``, ``"masked"`` or ``"classifier"``; what a predicts if None.
        scored: for each row, True at the tokens whose predictions are compared: those of a
            completion, or the masked ones. If None, a causal LM predicts a next token at every
            position of a row, the last of them being the first token of an answer; a masked LM
            predicts the tokens that are `mask_id`.
        mask_id: the id of the mask token, for masked LMs if `scored` is None.
        batch_size: the most rows that go through the models together.

    Returns:
        Shares with intervals; or the reason why there are none.
    """
    found: Kind = (kind_of(a) or "causal") if kind is None else kind
    models = (a, b)
    limit = min([n for n in map(longest_row, models) if n is not None], default=None)
    marks = [None] * len(rows) if scored is None else scored
    counted = [_counted(found, row, mark, mask_id) for row, mark in zip(rows, marks, strict=True)]
    fits = [
        bool(some) and (limit is None or len(row) <= limit)
        for row, some in zip(rows, counted, strict=True)
    ]
    chosen, positions = list(compress(rows, fits)), list(compress(counted, fits))
    summary = Agreement(names, found, left_out=len(rows) - len(chosen))
    if (reason := _why_not(found, models, names, rows, chosen, limit)) is not None:
        return replace(summary, reason=reason)
    with undisturbed(models):
        equal = _equal(found, models, chosen, positions, batch_size)
    if equal is None:
        return replace(summary, reason="the outputs of a model are not finite on these rows")
    shares = _shares(found, equal, first=0 if scored is not None else -1)
    return replace(summary, **shares, rows=len(chosen))


def kind_of(model: PreTrainedModel) -> Kind | None:
    """What a model predicts, from its class; None if it is none of the known kinds.

    Args:
        model: a loaded model.
    """
    name = type(model).__name__
    if "SequenceClassification" in name:
        return "classifier"
    whole: Any = model
    if whole.get_output_embeddings() is None:
        return None
    return "masked" if "MaskedLM" in name else "causal"


def _counted(
    kind: Kind, row: Sequence[int], scored: Sequence[bool] | None, mask_id: int | None
) -> list[int]:
    """The positions of a row whose outputs are compared."""
    if kind == "classifier":
        return [0] if row else []
    if kind == "masked":
        where = [token == mask_id for token in row] if scored is None else scored
        return [position for position, wanted in enumerate(where) if wanted]
    if scored is None:
        return list(range(len(row)))
    # A token is predicted at the position before it.
    return [position - 1 for position, wanted in enumerate(scored) if wanted and position]


def _why_not(
    kind: Kind,
    models: tuple[PreTrainedModel, PreTrainedModel],
    names: tuple[str, str],
    rows: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    limit: int | None,
) -> str | None:
    """Why the predictions cannot be compared, in words."""
    if not chosen:
        if rows and limit is not None and all(len(row) > limit for row in rows):
            return f"every row has more than the {limit} tokens for which the models have positions"
        return "no row has a masked token" if kind == "masked" else "there are no rows"
    for model, name in zip(models, names, strict=True):
        if kind_of(model) != kind:
            return f"{name} is a {type(model).__name__}, which does not predict a {_PREDICTS[kind]}"
        if kind == "classifier" and (
            len(_labels(model)) < 2
            or model.config.problem_type not in (None, "single_label_classification")
        ):
            return f"{name} does not choose one label of several"
    counts = [len(_labels(model)) for model in models] if kind == "classifier" else [0, 0]
    if counts[0] != counts[1]:
        return f"{names[0]} has {counts[0]} labels, {names[1]} has {counts[1]}"
    return why_not(models, names, chosen)


def _equal(
    kind: Kind,
    models: tuple[PreTrainedModel, PreTrainedModel],
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    batch_size: int,
) -> list[list[bool]] | None:
    """For each row, whether the models agree at each counted position; None without numbers."""
    size = min(_size(kind, model, rows, batch_size) for model in models)
    equal: list[list[bool]] = [[] for _ in rows]
    for batch in batches(rows, size):
        best = [run(model, batch).logits.max(-1) for model in models]
        outputs = [found.indices.cpu() for found in best]
        finite = [found.values.isfinite().cpu() for found in best]
        if kind == "classifier":
            outputs[1] = _same_labels(models)[outputs[1]]
            outputs, finite = ([found[:, None] for found in some] for some in (outputs, finite))
        same = outputs[0] == outputs[1]
        for place, number in enumerate(batch.numbers):
            if not all(bool(found[place, positions[number]].all()) for found in finite):
                return None
            equal[number] = [bool(same[place, position]) for position in positions[number]]
    return equal


def _size(
    kind: Kind, model: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int
) -> int:
    """The rows of a batch: the logits of a vocabulary take much memory."""
    if kind == "classifier":
        # Without an id for padding, a causal classifier takes one row at a time.
        return (
            1
            if getattr(model.config.get_text_config(), "pad_token_id", None) is None
            else batch_size
        )
    item = next(model.parameters()).element_size()
    row_bytes = max(map(len, rows)) * vocabulary(model) * item
    return max(1, min(batch_size, _LOGITS // row_bytes))


def _labels(model: PreTrainedModel) -> list[str]:
    """The names of a classifier's labels, by number."""
    names: Any = model.config.id2label or {}
    return [str(names[number]) for number in sorted(names)]


def _same_labels(models: tuple[PreTrainedModel, PreTrainedModel]) -> torch.Tensor:
    """For each label of the second model, the number that the first one has for it."""
    import torch

    ours, theirs = (_labels(model) for model in models)
    if set(ours) != set(theirs) or len(set(ours)) < len(ours):
        return torch.arange(len(ours))  # the names say nothing: labels are equal by number
    return torch.tensor([ours.index(label) for label in theirs])


def _shares(kind: Kind, equal: Sequence[Sequence[bool]], *, first: int) -> dict[str, Any]:
    if kind == "classifier":
        return {"label": share_of(COUNTED["label"], equal)}
    if kind == "masked":
        return {"masked_token": share_of(COUNTED["masked_token"], equal)}
    answers = [[row[first]] for row in equal]
    return {
        "next_token": share_of(COUNTED["next_token"], equal),
        "first_token": share_of(COUNTED["first_token"], answers),
    }
