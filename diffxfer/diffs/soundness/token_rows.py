"""Tokens of the tokenizer without a row in the embedding."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.diffs.soundness.finding import Finding, name_tokens
from diffxfer.diffs.soundness.stops import stop_ids
from diffxfer.diffs.vocab.token_files import read_added
from diffxfer.diffs.vocab.tokens import SPECIALS_FILES, stated_roles

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from diffxfer.checkpoints.beside import Beside
    from diffxfer.diffs.soundness.model import Model
    from diffxfer.diffs.vocab.tokens import Tokenizer

_NAMING = ("tokenizer.json", "added_tokens.json", *SPECIALS_FILES)
# A text-only model keeps the placeholders of its family (Gemma 3 1B), and a multimodal model
# replaces their rows by image or audio features.
_MEDIA = re.compile(r"image|img|vision|video|audio|speech|frame|patch", re.IGNORECASE)
# If more than this share of its tokens lack a row, the tokenizer belongs to another model.
_FOREIGN = 0.01


@dataclass(frozen=True, slots=True)
class _Use:
    """A place that names a token.

    Attributes:
        file: the file.
        key: the setting, ``"chat_template"`` for a template.
        fatal: whether the model fails if the token has no row.
    """

    file: str
    key: str
    fatal: bool


def token_findings(model: Model) -> Iterator[Finding]:
    """Find tokens without a row in the embedding that are used.

    Args:
        model: any model; without a tokenizer or an embedding there are no findings.
    """
    if model.tokenizer is None or model.embedding is None:
        return
    lacking = without_row(model.tokenizer, model.embedding.rows)
    if not lacking:
        return
    uses = _uses(model, lacking)
    by_use: dict[_Use, list[int]] = {}
    for i in lacking:
        for use in uses.get(i, ()):
            by_use.setdefault(use, []).append(i)
    for use, ids in by_use.items():
        yield _used(model, use, ids)
    if text := _text_tokens(model, lacking, uses):
        yield _foreign(model, text)


def idle_findings(model: Model) -> Iterator[Finding]:
    """Find tokens without a row in the embedding that are not used.

    Args:
        model: any model.
    """
    tokens = () if model.tokenizer is None else model.tokenizer.tokens
    idle = [i for i in idle_tokens(model) if not is_placeholder(tokens[i] or "")]
    if not idle:
        return
    files = [file for file in _NAMING if _names(model.files.read(file), [tokens[i] for i in idle])]
    it, have = ("it", "has") if len(idle) == 1 else ("them", "have")
    yield Finding(
        "warning",
        model.table,
        name_tokens(idle, tokens),
        f"{have} no row in the embedding ({model.rows}); no template, stop list or special token"
        f" uses {it}",
        f"remove {it} from {' and '.join(files or [model.table])}, or "
        f"{_resize(model, max(idle) + 1)}",
    )


def is_placeholder(token: str) -> bool:
    """Whether a token is a placeholder for non-text input, such as an image."""
    return _MEDIA.search(token) is not None


def without_row(tokenizer: Tokenizer, rows: int) -> list[int]:
    """The ids, in order, of a tokenizer's tokens beyond an embedding's rows."""
    tokens = tokenizer.tokens
    return [i for i in range(rows, len(tokens)) if tokens[i] is not None]


def _uses(model: Model, ids: Collection[int]) -> dict[int, list[_Use]]:
    """The uses of each of these tokens."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    found: dict[int, list[_Use]] = {}
    by_token = {tokenizer.tokens[i]: i for i in reversed(list(ids))}
    for file, text in model.templates:
        for token, i in by_token.items():
            # Only special tokens: a template's text has many regular tokens.
            if i in tokenizer.special and token and token in text:
                fatal = not is_placeholder(token)
                found.setdefault(i, []).append(_Use(file, "chat_template", fatal))
    for file, key, i, fatal in (*_roles(model, by_token), *_stops(model, by_token)):
        told = found.setdefault(i, []) if i in ids else []
        if all(use.key != key for use in told):
            told.append(_Use(file, key, fatal))
    return found


def _roles(
    model: Model, by_token: Mapping[str | None, int]
) -> Iterator[tuple[str, str, int, bool]]:
    """Uses as roles in the tokenizer's files; fatal only for roles that every text needs."""
    config = model.files.document("tokenizer_config.json")
    begins = config.get("add_bos_token") is not False
    for file, role, token in stated_roles(model.files):
        if token in by_token:
            fatal = role == "eos" or (role == "bos" and begins)
            yield file, f"{role}_token", by_token[token], fatal


def _stops(
    model: Model, by_token: Mapping[str | None, int]
) -> Iterator[tuple[str, str, int, bool]]:
    """Uses in stop lists, and as a decoder's start token."""
    stops = stop_ids(model)
    yield from ((stops.file, "eos_token_id", i, True) for i in stops.ids)
    file = "generation_config.json"
    settings = model.files.document(file)
    for key in ("decoder_start_token_id", "forced_bos_token_id"):
        if type(settings.get(key)) is int:
            yield file, key, settings[key], True
    strings = settings.get("stop_strings")
    for text in strings if isinstance(strings, list) else [strings]:
        if isinstance(text, str) and text in by_token:
            yield file, "stop_strings", by_token[text], False


def _used(model: Model, use: _Use, ids: Sequence[int]) -> Finding:
    assert model.tokenizer is not None
    assert model.embedding is not None
    named = name_tokens(ids, model.tokenizer.tokens)
    it, have = ("it", "has") if len(ids) == 1 else ("them", "have")
    lacks = f"{have} no row in the embedding ({model.rows})"
    resize = _resize(model, max(ids) + 1)
    behaviour = model.owners.behaviour
    if use.key == "chat_template":
        return Finding(
            "error" if use.fatal else "warning",
            model.table,
            named,
            f"{lacks}, and the chat template in {use.file} writes {it}",
            f"{resize}, or remove {it} from {behaviour} chat template",
        )
    fails = ": a padded batch fails" if use.key == "pad_token" else ""
    return Finding(
        "error" if use.fatal else "warning",
        use.file,
        f"{use.key} {named}",
        f"{lacks}{fails}",
        f"{resize}, or set {use.key} {model.owners.place(use.file)} to a token with an id below "
        f"{model.embedding.rows}",
    )


def _resize(model: Model, rows: int) -> str:
    """The remedy that gives tokens a row."""
    return (
        f"resize {model.owners.embedding} embedding (model.resize_token_embeddings({rows}), then "
        "save_pretrained)"
    )


def _text_tokens(model: Model, ids: Sequence[int], uses: Mapping[int, Sequence[_Use]]) -> list[int]:
    """The tokens that any text may contain: those of the vocabulary, as opposed to added tokens."""
    assert model.tokenizer is not None
    rest = [i for i in ids if i not in model.tokenizer.special and i not in uses]
    if not rest:
        return []
    added = _added_ids(model.files)
    return [i for i in rest if i not in added]


def _added_ids(files: Beside) -> set[int]:
    """The ids of added tokens."""
    listed = files.document("tokenizer.json").get("added_tokens")
    where = files.where("tokenizer.json")
    found = {read_added(entry, where, None).token_id for entry in listed or ()}
    found |= set(files.document("added_tokens.json").values())
    decoder = files.document("tokenizer_config.json").get("added_tokens_decoder") or {}
    return found | {int(key) for key in decoder}


def _foreign(model: Model, ids: Sequence[int]) -> Finding:
    assert model.tokenizer is not None
    tokens = model.tokenizer.tokens
    it, have = ("it", "has") if len(ids) == 1 else ("them", "have")
    return Finding(
        "error" if len(ids) > _FOREIGN * len(tokens) else "warning",
        model.table,
        name_tokens(ids, tokens),
        f"{have} no row in the embedding ({model.rows}), and any text may contain {it}",
        "replace it with the tokenizer that the model was trained with",
    )


def _names(raw: bytes | None, tokens: Sequence[str | None]) -> bool:
    return raw is not None and any((token or "").encode() in raw for token in tokens)


def idle_tokens(model: Model) -> list[int]:
    """The ids, in order, of tokens without a row and without a use.

    Args:
        model: any model; without a tokenizer or an embedding there are none.
    """
    if model.tokenizer is None or model.embedding is None:
        return []
    lacking = without_row(model.tokenizer, model.embedding.rows)
    if not lacking:
        return []
    uses = _uses(model, lacking)
    named = {*uses, *_text_tokens(model, lacking, uses)}
    return [i for i in lacking if i not in named]
