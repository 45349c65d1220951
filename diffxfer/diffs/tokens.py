"""Tokenizers: which token each row of an embedding belongs to, from whatever files there are.

No tokenizer library is asked: they renumber added tokens, need code for some formats, and load
merges that nobody here looks at.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from diffxfer.checkpoints.companions import (
    TEMPLATE_FOLDER,
    companion_path,
    parse_object,
    read_bytes,
    read_object,
)
from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

MAX_TOKENS = 1 << 22
"""Above any vocabulary there is, and small enough that a lying id cannot fill the memory."""

_RESERVED = re.compile(
    r"[<\[>].*(reserved|unused|extra_?id|extra_\d|place.?holder|dummy|control_\d|special_\d).*[>\]<]",
    re.IGNORECASE | re.DOTALL,
)
_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_DECISIVE = ("bos", "eos", "pad")

# Pieces of a SentencePiece model that stand for no text: unknown, control, user-defined.
_SPECIAL_PIECES = (2, 3, 4)
_REMEDY = "fetch or save the checkpoint again"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Which token each row of an embedding belongs to, and which tokens matter.

    Attributes:
        tokens: token strings by id, None for a hole; the last one is no hole.
        special: ids of tokens that are more than text: added tokens that are flagged special or
            written as markup (``<tool_call>``), and tokens that look reserved.
        chat_templates: the text of every chat template, concatenated.
        named: ids by role, such as ``{"eos": (128001, 128009)}``, from the tokenizer's files and
            from the configs.
        format: ``"tokenizer.json"``, ``"vocab.json"``, ``"sentencepiece"`` or ``"tiktoken"``.
        fingerprint: the xxh3_128 hex digest of ``tokens``, whatever file they came from.
    """

    tokens: tuple[str | None, ...]
    special: frozenset[int]
    chat_templates: str
    named: Mapping[str, tuple[int, ...]]
    format: str
    fingerprint: str

    def ids(self) -> dict[str, int]:
        """Ids by token string; the lowest where a string stands twice."""
        last = len(self.tokens) - 1
        ids = dict(zip(reversed(self.tokens), range(last, -1, -1), strict=True))
        return {token: i for token, i in ids.items() if token is not None}

    def use(self, token_id: int) -> str:
        """What the model uses a token for: ``"bos"``, ``"eos"``, ``"pad"``, ``"chat template"``.

        A template is searched for special tokens only: as text, it contains many regular ones.

        Returns:
            The use, or ``""``: nothing breaks where this token has another name.
        """
        for role in _DECISIVE:
            if token_id in self.named.get(role, ()):
                return role
        if token_id in self.special and (self.tokens[token_id] or "\0") in self.chat_templates:
            return "chat template"
        return ""

    def matters(self, token_id: int) -> bool:
        """Whether the model's behaviour hangs on a token: see `use`."""
        return bool(self.use(token_id))


class _Table(NamedTuple):
    tokens: tuple[str | None, ...]
    special: frozenset[int]
    format: str
    fingerprint: str


class _Added(NamedTuple):
    token_id: int
    token: str
    flagged: bool


def fingerprint_tokens(tokens: Iterable[str | None]) -> str:
    """The xxh3_128 hex digest of a token table: of ids and strings, not of any file's layout."""
    text = json.dumps(list(tokens), separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Read the tokenizer of a checkpoint.

    ``tokenizer.json`` comes first, then ``vocab.json``, then ``tokenizer.model`` (SentencePiece
    or tiktoken), then ``*.tiktoken``. Tokens of ``added_tokens.json`` and of the
    ``added_tokens_decoder`` in ``tokenizer_config.json`` are laid over it. Files with the same
    bytes are parsed once.

    Args:
        folder: the checkpoint.

    Returns:
        The tokenizer, or None if there is none of these files.

    Raises:
        CompanionError: a file of it is unsafe, unreadable, or means nothing.
    """
    path = _table_file(folder)
    if path is None:
        return None
    config_path, config = _optional(folder, "tokenizer_config.json")
    table = _overlay(_parsed(path), _later_tokens(folder, config_path, config), path)
    tokens, special, kind, fingerprint = table
    return Tokenizer(
        tokens=tokens,
        special=special,
        chat_templates=_chat_templates(folder, config_path, config),
        named=_named(folder, tokens),
        format=kind,
        fingerprint=fingerprint,
    )


def _table_file(folder: Path) -> Path | None:
    names = ["tokenizer.json", "vocab.json", "tokenizer.model"]
    names += [*sorted(path.name for path in folder.glob("*.tiktoken")), "tiktoken.model"]
    paths = (companion_path(folder, name) for name in names)
    return next((path for path in paths if path is not None), None)


def _optional(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    path = companion_path(folder, name)
    return folder / name, {} if path is None else read_object(path)


_cache: dict[tuple[str, str], _Table] = {}


def _parsed(path: Path) -> _Table:
    """The table in a file, shared by every file with the same bytes: the roles' often agree."""
    raw = read_bytes(path)
    kind = path.name
    if kind not in ("tokenizer.json", "vocab.json"):
        kind = "tiktoken" if _TIKTOKEN.match(raw) or ".tiktoken" in kind else "sentencepiece"
    key = kind, xxhash.xxh3_128_hexdigest(raw)
    table = _cache.get(key)
    if table is None:
        by_id, special = _PARSERS[kind](raw, path)
        table = _table(by_id, special, kind, path)
        _cache[key] = table
        for stale in list(_cache)[:-4]:
            _cache.pop(stale, None)
    return table


def _table(by_id: Mapping[int, str], special: Iterable[int], kind: str, where: Path) -> _Table:
    if not by_id:
        raise CompanionError(where, "holds no token", _REMEDY)
    row: list[str | None] = [None] * (max(by_id) + 1)
    for token_id, token in by_id.items():
        row[token_id] = token
    reserved = (i for i, token in by_id.items() if _RESERVED.fullmatch(token))
    tokens = tuple(row)
    return _Table(tokens, frozenset((*special, *reserved)), kind, fingerprint_tokens(tokens))


def _from_tokenizer_json(raw: bytes, where: Path) -> tuple[dict[int, str], set[int]]:
    document = parse_object(raw, where)
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        by_id = dict(enumerate(_unigram_piece(entry, where) for entry in vocab))
    else:
        by_id = _by_id(vocab, where)
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise _malformed(where, "added_tokens", "a list", entries)
    special = set()
    for added in [_added(entry, where, None) for entry in entries]:
        known = by_id.setdefault(added.token_id, added.token)
        if known != added.token:
            raise _twice(where, added.token_id, known, added.token)
        if _is_special(added):
            special.add(added.token_id)
    return by_id, special


def _from_vocab_json(raw: bytes, where: Path) -> tuple[dict[int, str], set[int]]:
    return _by_id(parse_object(raw, where), where), set()


def _from_sentencepiece(raw: bytes, where: Path) -> tuple[dict[int, str], set[int]]:
    """The pieces of a ``ModelProto``: field 1, whose field 1 is the text and field 3 the type."""
    by_id: dict[int, str] = {}
    special: set[int] = set()
    try:
        for number, message in _fields(raw):
            if number != 1:
                continue
            piece = dict(_fields(_content(message)))
            token_id = _check_id(len(by_id), "a piece", where)
            by_id[token_id] = _content(piece.get(1)).decode("utf-8")
            if piece.get(3) in _SPECIAL_PIECES:
                special.add(token_id)
    except ValueError as exc:  # UnicodeDecodeError is one
        reason = "text that is not UTF-8" if isinstance(exc, UnicodeDecodeError) else str(exc)
        problem = f"is not a SentencePiece model: {reason}, at piece {len(by_id)}"
        raise CompanionError(where, problem, _REMEDY) from exc
    return by_id, special


def _content(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a piece without text")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message (https://protobuf.dev/programming-guides/encoding/)."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of unknown wire type {wire}")
        if size > end - at:
            raise ValueError(f"{size} bytes announced and {end - at} there")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for byte in message[at : at + 10]:
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number that does not end")


def _from_tiktoken(raw: bytes, where: Path) -> tuple[dict[int, str], set[int]]:
    """Lines of base64 and rank; bytes are spelled as ``tokenizer.json`` would spell them."""
    alphabet = _byte_alphabet()
    by_id: dict[int, str] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        word, _, rank = line.partition(b" ")
        if not line:
            continue
        try:
            token = base64.b64decode(word, validate=True).decode("latin-1").translate(alphabet)
            token_id = _check_id(_digits(rank.decode("ascii")), token, where)
        except (binascii.Error, ValueError) as exc:
            problem = f"line {number} is not base64 and a rank"
            raise CompanionError(where, problem, _REMEDY) from exc
        known = by_id.setdefault(token_id, token)
        if known != token:
            raise _twice(where, token_id, known, token)
    return by_id, set()


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-in for every byte (openai/gpt-2, ``bytes_to_unicode``)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: 256 + place for place, byte in enumerate(others)}


_PARSERS: Mapping[str, Callable[[bytes, Path], tuple[dict[int, str], set[int]]]] = {
    "tokenizer.json": _from_tokenizer_json,
    "vocab.json": _from_vocab_json,
    "sentencepiece": _from_sentencepiece,
    "tiktoken": _from_tiktoken,
}


def _later_tokens(folder: Path, config_path: Path, config: Mapping[str, Any]) -> list[_Added]:
    """What ``added_tokens.json`` and ``added_tokens_decoder`` say, by id."""
    path, listed = _optional(folder, "added_tokens.json")
    found = [_Added(i, token, False) for i, token in _by_id(listed, path).items()]
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise _malformed(config_path, "added_tokens_decoder", "an object", decoder)
    found += [_added(entry, config_path, key) for key, entry in decoder.items()]
    return sorted(found, key=lambda added: added.token_id)


def _overlay(table: _Table, later: list[_Added], where: Path) -> _Table:
    """The table with the tokens that transformers adds when it loads it.

    A ``tokenizer.json`` is the last word on what it holds: only tokens that it lacks come to it,
    at free ids. Elsewhere a special slot may be renamed, as a slow tokenizer would.
    """
    if not later:
        return table
    by_id = {i: token for i, token in enumerate(table.tokens) if token is not None}
    present = set(by_id.values())
    special = set(table.special)
    complete = table.format == "tokenizer.json"
    changed = False
    for added in later:
        known = by_id.get(added.token_id)
        if complete and known != added.token and (known is not None or added.token in present):
            continue
        if known not in (None, added.token) and added.token_id not in special:
            raise _twice(where, added.token_id, str(known), added.token)
        changed = changed or known != added.token
        by_id[added.token_id] = added.token
        if _is_special(added):
            special.add(added.token_id)
    if changed:
        return _table(by_id, special, table.format, where)
    return table._replace(special=frozenset(special))


def _is_special(added: _Added) -> bool:
    return added.flagged or _MARKUP.fullmatch(added.token) is not None


def _by_id(vocab: object, where: Path) -> dict[int, str]:
    if not isinstance(vocab, dict):
        raise _malformed(where, "the vocabulary", "an object of ids by token", vocab)
    by_id: dict[int, str] = {}
    for token, token_id in vocab.items():
        known = by_id.setdefault(_check_id(token_id, token, where), token)
        if known is not token:
            raise _twice(where, token_id, known, token)
    return by_id


def _unigram_piece(entry: object, where: Path) -> str:
    if not (isinstance(entry, list) and entry and isinstance(entry[0], str)):
        raise _malformed(where, "a Unigram piece", "a list of text and score", entry)
    return entry[0]


def _added(entry: object, where: Path, key: str | None) -> _Added:
    """An entry of ``added_tokens``, or of ``added_tokens_decoder``, where its key is its id."""
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str):
        raise _malformed(where, "an added token", "an object with its content", entry)
    try:
        token_id = entry.get("id") if key is None else _digits(key)
    except ValueError as exc:
        raise _malformed(where, "the id of an added token", "a number", key) from exc
    return _Added(_check_id(token_id, content, where), content, entry.get("special") is True)


def _digits(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{text[:20]!r} is no id")
    return int(text)


def _check_id(token_id: object, token: str, where: Path) -> int:
    if isinstance(token_id, bool) or not isinstance(token_id, int):
        raise _malformed(where, f"the id of {token[:40]!r}", "a whole number", token_id)
    if not 0 <= token_id < MAX_TOKENS:
        problem = (
            f"the id of {token[:40]!r} is {reprlib.repr(token_id)}, where 0 to {MAX_TOKENS - 1} "
            "are possible"
        )
        raise CompanionError(where, problem, _REMEDY)
    return token_id


def _malformed(where: Path, what: str, expected: str, found: object) -> CompanionError:
    problem = f"{what} must be {expected} and is {reprlib.repr(found)}"
    return CompanionError(where, problem, _REMEDY)


def _twice(where: Path, token_id: int, first: str, second: str) -> CompanionError:
    problem = f"id {token_id} is both {first[:40]!r} and {second[:40]!r}"
    return CompanionError(where, problem, "keep one of them: a row has one token")


def _chat_templates(folder: Path, config_path: Path, config: Mapping[str, Any]) -> str:
    names = ["chat_template.jinja"]
    names += sorted(
        f"{TEMPLATE_FOLDER}/{p.name}" for p in folder.glob(f"{TEMPLATE_FOLDER}/*.jinja")
    )
    texts = [_text(path) for path in (companion_path(folder, name) for name in names) if path]
    path, document = _optional(folder, "chat_template.json")
    for where, source in ((path, document), (config_path, config)):
        templates = source.get("chat_template")
        for template in templates if isinstance(templates, list) else [templates]:
            text = template.get("template") if isinstance(template, dict) else template
            if not isinstance(text, str | None):
                raise _malformed(where, "chat_template", "text", text)
            texts.append(text or "")
    return "\n".join(text for text in texts if text)


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise CompanionError(path, "is not UTF-8 text", _REMEDY) from exc


def _named(folder: Path, tokens: tuple[str | None, ...]) -> dict[str, tuple[int, ...]]:
    """Ids by role, in the order in which they are met: the tokenizer's own, then the configs'."""
    named: dict[str, dict[int, None]] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for role, token in _role_strings(*_optional(folder, name)):
            if token in tokens:
                named.setdefault(role, {})[tokens.index(token)] = None
    for name in ("config.json", "generation_config.json"):
        for role, token_id in _role_ids(*_optional(folder, name)):
            # Some configs say -1 for none, and some name an id that their tokenizer lacks.
            if 0 <= token_id < len(tokens) and tokens[token_id] is not None:
                named.setdefault(role, {})[token_id] = None
    return {role: tuple(found) for role, found in named.items()}


def _role_strings(where: Path, document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for role in _NAMES:
        value = document.get(f"{role}_token")
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            yield role, token
        elif value is not None:
            raise _malformed(where, f"{role}_token", "text", value)


def _role_ids(where: Path, document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    inner = document.get("text_config")
    for level in (document, inner if isinstance(inner, dict) else {}):
        for role in _DECISIVE:
            value = level.get(f"{role}_token_id")
            for token_id in value if isinstance(value, list) else [value]:
                if isinstance(token_id, int) and not isinstance(token_id, bool):
                    yield role, token_id
                elif token_id is not None:
                    raise _malformed(where, f"{role}_token_id", "an id or a list of ids", value)
