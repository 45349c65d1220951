"""Training rows, read from a file or the Hub and validated before training begins.

A row has `messages`, `prompt` and `completion`, or `text`; to train a classifier `text` and
`label`, or `text`, `text_pair` and `label`. All rows must have the format of the first one; further
keys are ignored.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import xxhash

from diffxfer.checkpoints.header import short
from diffxfer.errors import DataError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    Numbered: TypeAlias = Iterable[tuple[str, object]]
    """Rows with their positions, such as ``"line 3"``."""

ROW_FORMS = (("messages",), ("prompt", "completion"), ("text",))
"""The sets of keys of a row that a causal language model can be trained on."""
LABELLED_FORMS = (("text", "text_pair", "label"), ("text", "label"))
"""The sets of keys of a row that a classifier can be trained on."""
TEXT_FORMS = (("text",),)
"""The keys of a row that a masked language model can be trained on."""

_FILES = (".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@\S+)?")
_ROLES = ("role", "content")


@dataclass(frozen=True, slots=True)
class Accepted:
    """The formats of rows that a training accepts.

    Attributes:
        forms: the sets of keys of a row; the first that a row has is used.
        learner: what is trained on them, for messages.
    """

    forms: tuple[tuple[str, ...], ...]
    learner: str = ""


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Training rows of one format.

    Attributes:
        name: the name of the file, or the id of the dataset on the Hub.
        columns: the values of each key, in the order of the rows.
        digest: the xxh3-128 of the values in their order, in hexadecimal.
    """

    name: str
    columns: dict[str, list[Any]]
    digest: str

    def __len__(self) -> int:
        """The number of rows."""
        return len(next(iter(self.columns.values())))

    @property
    def chat(self) -> bool:
        """Whether a row consists of messages, which a chat template formats."""
        return not isinstance(next(iter(self.columns.values()))[0], str)


def is_local_file(data: str) -> bool:
    """Whether the data is a local file, or looks like the path of one.

    Args:
        data: a path, or the id of a dataset on the Hub.
    """
    looks_like_a_path = data.endswith(_FILES) or data.startswith((".", "/", "~"))
    return looks_like_a_path or Path(data).exists() or _HUB_ID.fullmatch(data) is None


def read_rows(
    data: str, accept: Callable[[Collection[str]], Accepted] | None = None
) -> TrainingRows:
    """Read and validate training rows.

    Args:
        data: a ``.jsonl``, ``.json`` or ``.parquet`` file, or the id of a dataset on the Hub, of
            which the ``train`` split is read; ``id@revision`` selects a revision.
        accept: the accepted formats, by the keys of the first row that have a value; None for
            those of a causal language model.

    Returns:
        The rows, in memory.

    Raises:
        DataError: if there are no rows, or one of them is invalid.
    """
    name, rows = number_rows(data)
    return _validate_rows(data, name, rows, accept or (lambda _: Accepted(ROW_FORMS)))


def number_rows(data: str) -> tuple[str, Numbered]:
    """Open a file or a dataset of rows, whatever keys they have.

    Args:
        data: a ``.jsonl``, ``.json`` or ``.parquet`` file, or the id of a dataset on the Hub, of
            which the ``train`` split is read; ``id@revision`` selects a revision.

    Returns:
        The name of the file or the dataset, and the rows with their positions. Rows of a file are
        read when they are asked for.

    Raises:
        DataError: if there is no such file or dataset, or while rows are read, if one is invalid.
    """
    if not is_local_file(data):
        return data, _read_hub(data)
    path = Path(data)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        remedy = f"give a file that ends in {', '.join(_FILES)}, or the id of a dataset on the Hub"
        raise DataError(data, f"{problem}, expected a file of training rows", remedy)
    readers = {".jsonl": _read_lines, ".json": _read_array, ".parquet": _read_parquet}
    reader = readers.get(path.suffix)
    if reader is None:
        remedy = f"convert it to one of {', '.join(_FILES)}"
        raise DataError(data, "has an unsupported file type", remedy)
    return path.name, reader(path)


def _read_lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parse(line, path, f"line {number}: ")


def _read_array(path: Path) -> Iterator[tuple[str, object]]:
    found = _parse(path.read_bytes(), path, "")
    if not isinstance(found, list):
        problem = f"contains {short(found)}, expected a JSON array of rows"
        raise DataError(path, problem, "store one row per line in a .jsonl file")
    for number, row in enumerate(found, 1):
        yield f"row {number}", row


def _parse(raw: bytes, path: Path, place: str) -> object:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as exc:
        problem = f"{place}is not JSON ({exc})"
        raise DataError(path, problem, "store one JSON object per line, in UTF-8") from exc


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            rows = (row for batch in batches for row in batch)
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    except ArrowException as exc:
        problem = f"is not a readable Parquet file ({first_line(exc)})"
        raise DataError(path, problem, "download or store it again") from exc


def _read_hub(data: str) -> Numbered:
    import datasets

    name, _, revision = data.partition("@")
    try:
        found = datasets.load_dataset(name, split="train", revision=revision or None)
    except Exception as exc:  # the loader passes on any exception of its libraries
        raise DataError(
            data,
            "is not a local file, and cannot be loaded as a dataset from the Hub"
            f" ({type(exc).__name__}: {first_line(exc)})",
            "check the id, and that it has a train split; or download it and give the file",
        ) from exc
    return ((f"row {number}", row) for number, row in enumerate(found, 1))


def _validate_rows(
    where: str, name: str, rows: Numbered, accept: Callable[[Collection[str]], Accepted]
) -> TrainingRows:
    digest = xxhash.xxh3_128()
    columns: dict[str, list[Any]] = {}
    fuller: list[tuple[str, ...]] = []
    first = ""
    for place, row in rows:
        if not isinstance(row, dict):
            problem = f"{place} is {short(row)}, expected an object"
            raise DataError(where, problem, _forms_hint(accept(())))
        if not columns:
            first = place
            present = [key for key, value in row.items() if value is not None]
            accepted = accept(present)
            columns = {key: [] for key in _match_form(where, place, row, accepted)}
            fuller = [form for form in accepted.forms if set(form) > columns.keys()]
        _refuse_more(where, place, first, row, fuller, columns)
        for key, values in columns.items():
            value = _check_value(where, place, key, row)
            if values and type(value) is not type(values[0]):
                kinds = {str: "text", list: "messages", int: "a number"}
                problem = (
                    f"{place} has {kinds[type(value)]} for {key!r}, and {first} has"
                    f" {kinds[type(values[0])]}"
                )
                raise DataError(where, problem, "give all rows the same format")
            values.append(value)
            digest.update(json.dumps([key, value], sort_keys=True).encode())
    if not columns:
        raise DataError(where, "has no rows", "give at least one")
    kinds_found = {type(values[0]) for key, values in columns.items() if key != "label"}
    if len(kinds_found) > 1:
        problem = f"{first} has text for one of prompt and completion, but messages for the other"
        raise DataError(where, problem, "give both as text, or both as lists of messages")
    return TrainingRows(name, columns, digest.hexdigest())


def _forms_hint(accepted: Accepted) -> str:
    return f"give every row {', or '.join(' and '.join(keys) for keys in accepted.forms)}"


def _match_form(where: str, place: str, row: dict[str, Any], accepted: Accepted) -> tuple[str, ...]:
    for keys in accepted.forms:
        if all(row.get(key) is not None for key in keys):
            return keys
    known = [key for keys in accepted.forms for key in keys if row.get(key) is not None]
    given = [key for key, value in row.items() if value is not None]
    found = f"has the keys {', '.join(map(short, list(row)[:8])) or 'none'}"
    if known and len(given) == 1:
        found = f"has only {known[0]!r}"
    why = "which is not a supported format"
    if accepted.learner:
        why = f"from which {accepted.learner} cannot learn"
    raise DataError(where, f"{place} {found}, {why}", _forms_hint(accepted))


def _refuse_more(
    where: str,
    place: str,
    first: str,
    row: dict[str, Any],
    fuller: Collection[tuple[str, ...]],
    columns: Collection[str],
) -> None:
    """Refuse a label or a second text that the first row lacks: it would be ignored."""
    for form in fuller:
        if all(row.get(key) is not None for key in form):
            key = next(key for key in reversed(form) if key not in columns)
            problem = f"{place} has {key!r}, which {first} lacks"
            raise DataError(where, problem, "give all rows the same format")


def _check_value(where: str, place: str, key: str, row: dict[str, Any]) -> Any:
    """Validate a value of a row, and return it in the form used for training."""
    value = row.get(key)

    def fail(problem: str, remedy: str) -> DataError:
        return DataError(where, f"{place} {problem}", remedy)

    if value is None:
        raise fail(f"lacks {key!r}, which the first row has", "give all rows the same format")
    if key == "label":
        return _check_label(fail, value)
    if isinstance(value, str) and key != "messages":
        if not value and key != "prompt":
            raise fail(f"has an empty {key!r}", "remove such rows")
        _refuse_surrogates(fail, key, value)
        return value
    if key in ("text", "text_pair") or not isinstance(value, list):
        due = "a list of messages" if key == "messages" else "text"
        due = "text or a list of messages" if key in ROW_FORMS[1] else due
        raise fail(f"has {short(value)} for {key!r}, expected {due}", "correct that row")
    if not value:
        raise fail(f"has an empty {key!r}", "remove such rows")
    return [_check_message(fail, key, number, message) for number, message in enumerate(value, 1)]


def _check_label(fail: Any, value: object) -> str | int:
    if isinstance(value, str) and value:
        _refuse_surrogates(fail, "label", value)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    problem = f"has {short(value)} for 'label', expected a name, or a whole number from 0 on"
    raise fail(problem, "give one label per row; other classifiers are not supported")


def _check_message(fail: Any, key: str, number: int, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        problem = f"has {short(message)} as message {number} of {key!r}"
        raise fail(problem, 'a message is an object with "role" and "content"')
    for name in _ROLES:
        if not isinstance(message.get(name), str):
            problem = f"has no text for {name!r} in message {number} of {key!r}"
            raise fail(problem, 'a message is an object with "role" and "content", both text')
        _refuse_surrogates(fail, key, message[name])
    # Ignoring them would silently change what the model is trained on.
    other = sorted(name for name, value in message.items() if name not in _ROLES and value)
    if other:
        problem = f"has {short(other[0])} in message {number} of {key!r}, which is not supported"
        raise fail(problem, 'a message has only "role" and "content"')
    return {name: message[name] for name in _ROLES}


def _refuse_surrogates(fail: Any, key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise fail(f"has an unpaired surrogate in {key!r}", "remove that character") from exc
