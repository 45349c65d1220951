"""The rows of a probe: read from a file or the Hub, sampled, and tokenized for any model."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from diffxfer.checkpoints.header import short
from diffxfer.checkpoints.text_config import config_parts
from diffxfer.errors import DataError, first_line
from diffxfer.probing.activations import shipped_text
from diffxfer.probing.rows import causal_rows, labelled_rows, masked_rows
from diffxfer.recycling.teacher import context_length
from diffxfer.recycling.training_data import number_rows, read_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from diffxfer.probing.rows import TokenRow

    Kind: TypeAlias = Literal["causal", "classifier", "masked"]

ROWS = 200
"""The default number of rows, drawn from all rows by a seed: eleven points of a path stay quick."""


def model_kind(config: Mapping[str, Any]) -> Kind:
    """What a model predicts, by the architecture that its config names.

    Args:
        config: the content of its config.json.

    Returns:
        ``"classifier"``, ``"masked"`` or ``"causal"``, which is every other architecture.
    """
    named = [str(name) for name in config.get("architectures") or ()]
    if any(name.endswith("ForSequenceClassification") for name in named):
        return "classifier"
    return "masked" if any(name.endswith("ForMaskedLM") for name in named) else "causal"


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """Rows that each model of a probe is given.

    Attributes:
        name: the name of the file, or the id of the dataset on the Hub.
        kind: what the models predict.
        columns: the values of each key, in the order of the rows.
        labels: for classifiers, the number of the label of each row.
        total: the number of rows that they were drawn from.
        max_length: the maximum number of tokens of a row.
        limit: the maximum number of tokenized rows; long texts are several.
        seed: of the draw, and of the choice of masked tokens.
    """

    name: str
    kind: Kind
    columns: Mapping[str, Sequence[Any]]
    labels: Sequence[int]
    total: int
    max_length: int
    limit: int
    seed: int

    @property
    def chat(self) -> bool:
        """Whether a row consists of messages, which a chat template formats."""
        return not isinstance(next(iter(self.columns.values()))[0], str)

    def tokenize(self, tokenizer: Any) -> tuple[TokenRow, ...]:
        """Tokenize the rows for a model.

        Args:
            tokenizer: of transformers, with a chat template if rows have messages.

        Returns:
            At most `limit` rows; where windows of long texts are more, a seeded sample.

        Raises:
            DataError: if no row has a token to predict, the chat template rejects a row, or the
                tokenizer lacks a token that the rows need.
        """
        self._check(tokenizer)
        try:
            rows = tuple(self._tokenized(tokenizer))
        except Exception as exc:  # a template may raise anything
            if not self.chat:
                raise
            problem = f"a row is rejected by the chat template ({first_line(exc)})"
            raise DataError(self.name, problem, "correct or remove that row") from exc
        if not rows:
            problem = f"no row has a token to predict within {self.max_length} tokens"
            raise DataError(self.name, problem, "give longer texts or completions")
        return tuple(rows[place] for place in _sample(len(rows), self.limit, self.seed))

    def _check(self, tokenizer: Any) -> None:
        due = {"causal": "eos_token", "masked": "mask_token"}.get(self.kind)
        if due == "eos_token" and self.chat:
            return  # the chat template ends a row
        if due is not None and getattr(tokenizer, due) is None:
            problem = f"cannot be tokenized, since the model's tokenizer has no {due}"
            raise DataError(self.name, problem, f"set {due} in its tokenizer_config.json")

    def _tokenized(self, tokenizer: Any) -> Iterable[TokenRow]:
        length = self.max_length
        if self.kind == "causal":
            return causal_rows(self.columns, tokenizer, max_length=length)
        # A tokenizer without a limit states 10^30.
        length = min(length, tokenizer.model_max_length)
        if self.kind == "masked":
            texts = self.columns["text"]
            return masked_rows(texts, tokenizer, max_length=length, seed=self.seed)
        return labelled_rows(self.columns, self.labels, tokenizer, max_length=length)


def read_probe_rows(
    data: str,
    configs: Sequence[Mapping[str, Any]],
    *,
    limit: int = ROWS,
    max_length: int = 1024,
    seed: int = 0,
) -> ProbeRows:
    """Read, validate and sample the rows of a probe.

    Args:
        data: a ``.jsonl``, ``.json`` or ``.parquet`` file, or the id of a dataset on the Hub. Its
            rows have `messages`, `prompt` and `completion`, or `text`; for a classifier `text` and
            `label`, or `text`, `text_pair` and `label`; for a masked language model `text`.
        configs: the contents of the config.json of all models, which predict the same.
        limit: the maximum number of rows, drawn from all rows without replacement.
        max_length: the maximum number of tokens of a row; the shortest context of the models, if
            that is less.
        seed: of the draw, and of the choice of masked tokens.

    Returns:
        The rows, in the order of the file.

    Raises:
        DataError: if there are no rows, or one of them is invalid.
    """
    kind = model_kind(configs[0])
    length = min([max_length, *(_usable_length(config, kind, max_length) for config in configs)])
    if kind == "classifier":
        name, columns, labels = _read_labelled(data, _labels_by_name(configs[0]))
    else:
        found = read_rows(data)
        name, columns, labels = found.name, found.columns, []
        if kind == "masked" and "text" not in columns:
            problem = f"has rows of {' and '.join(columns)}, but the models predict masked tokens"
            raise DataError(data, problem, 'give rows with "text"')
    total = len(next(iter(columns.values())))
    kept = _sample(total, limit, seed)
    drawn = {key: [values[place] for place in kept] for key, values in columns.items()}
    labels = [labels[place] for place in kept] if labels else []
    return ProbeRows(name, kind, drawn, labels, total, length, limit, seed)


def shipped_rows(configs: Sequence[Mapping[str, Any]], *, seed: int = 0) -> ProbeRows | None:
    """The paragraphs of the text that ships, as rows.

    Args:
        configs: the contents of the config.json of all models, which predict the same.
        seed: of the choice of masked tokens.

    Returns:
        The rows; None for classifiers, since a text has no label.
    """
    kind = model_kind(configs[0])
    if kind == "classifier":
        return None
    texts = [" ".join(part.split()) for part in shipped_text().split("\n\n") if part.strip()]
    length = min(_usable_length(config, kind, 1024) for config in configs)
    count = len(texts)
    return ProbeRows("a text that ships", kind, {"text": texts}, [], count, length, ROWS, seed)


def _sample(total: int, limit: int, seed: int) -> Sequence[int]:
    if total <= limit:
        return range(total)
    return sorted(random.Random(seed).sample(range(total), limit))


def _usable_length(config: Mapping[str, Any], kind: Kind, default: int) -> int:
    context = context_length(config) or default
    if kind == "causal":
        return context
    # Positions of RoBERTa begin after the id of its padding token, which is 1; other encoders lose
    # a position or none.
    padding = config.get("pad_token_id")
    return max(2, context - (padding + 1 if isinstance(padding, int) and padding < 8 else 0))


def _labels_by_name(config: Mapping[str, Any]) -> dict[str, int]:
    for part in config_parts(config):
        found = part.get("id2label")
        if isinstance(found, dict):
            return {str(name): int(number) for number, name in found.items()}
    number = config.get("num_labels", 2)
    return {f"LABEL_{label}": label for label in range(number if isinstance(number, int) else 2)}


def _read_labelled(
    data: str, known: Mapping[str, int]
) -> tuple[str, dict[str, list[Any]], list[int]]:
    name, rows = number_rows(data)
    columns: dict[str, list[Any]] = {}
    labels: list[int] = []
    for place, row in rows:
        if not isinstance(row, dict) or "label" not in row:
            problem = f"{place} is {short(row)}, expected text and a label"
            raise DataError(data, problem, 'give every row "text" and "label"')
        if not columns:
            pair = ("text_pair",) if row.get("text_pair") is not None else ()
            columns = {key: [] for key in ("text", *pair)}
        for key, values in columns.items():
            if not isinstance(row.get(key), str):
                problem = f"{place} has {short(row.get(key))} for {key!r}, expected text"
                raise DataError(data, problem, "give all rows the same format")
            values.append(row[key])
        labels.append(_label_number(data, place, row["label"], known))
    if not columns:
        raise DataError(data, "has no rows", "give at least one")
    return name, columns, labels


def _label_number(data: str, place: str, label: object, known: Mapping[str, int]) -> int:
    if isinstance(label, str) and label in known:
        return known[label]
    if isinstance(label, int) and not isinstance(label, bool) and label in known.values():
        return label
    names = ", ".join(short(name) for name in list(known)[:8])
    problem = f"{place} has the label {short(label)}, but the model has {names}"
    raise DataError(data, problem, "give the name or the number of a label of the model")


def borrow_template(rows: ProbeRows, tokenizers: Sequence[Any]) -> None:
    """Give tokenizers without a chat template the template of the first that has one.

    A base model has none; then its rows are those of its fine-tune.

    Args:
        rows: the rows; only messages need a template.
        tokenizers: of all models that are given the same rows.

    Raises:
        DataError: if rows of messages need a template and no tokenizer has one.
    """
    if not rows.chat:
        return
    template = next((found for each in tokenizers if (found := each.chat_template)), None)
    if template is None:
        problem = f"has {' and '.join(rows.columns)} of messages, but no model has a chat template"
        raise DataError(rows.name, problem, "give rows of text: prompt and completion, or text")
    for tokenizer in tokenizers:
        tokenizer.chat_template = tokenizer.chat_template or template
