"""Reading the files that list a vocabulary, in all their formats."""

from __future__ import annotations

import base64
import binascii
import json
import re
import reprlib
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from diffxfer.checkpoints.json_read import parse_object
from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

MAX_TOKENS = 1 << 22
"""More than any known vocabulary has."""
_SPARSE, _FREE_IDS = 64, 1 << 16
"""The most ids per token, and the ids that are always allowed. A table takes memory in proportion
to its largest id, so a small file could demand a lot."""
REMEDY = "download or save the checkpoint again"

_RESERVED = re.compile(
    r"[<\[>].*(reserved|unused|extra_?id|extra_\d|place.?holder|dummy|control_\d|special_\d).*[>\]<]",
    re.IGNORECASE | re.DOTALL,
)
# Longer tokens are not slots; the pattern's run time is quadratic in their length.
_LONGEST_RESERVED = 200
_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")

# Types of SentencePiece pieces that are not plain text: unknown, control, user-defined.
_SPECIAL_PIECES = (2, 3, 4)


class TokenTable(NamedTuple):
    """Tokens by id, with their properties: see `diffxfer.diffs.vocab.tokens.Tokenizer`."""

    tokens: tuple[str | None, ...]
    special: frozenset[int]
    format: str
    fingerprint: str


class AddedToken(NamedTuple):
    """A token listed outside the vocabulary; ``flagged`` if it is marked special."""

    token_id: int
    token: str
    flagged: bool


def fingerprint_tokens(tokens: Iterable[str | None]) -> str:
    """The xxh3_128 hex digest of a table's ids and strings; the file format does not matter."""
    text = json.dumps(list(tokens), separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))


_cache: dict[tuple[str, str], TokenTable] = {}


def read_table(path: Path, raw: bytes) -> TokenTable:
    """Read the table in a file; files with the same bytes, common among roles, share one table.

    Args:
        path: a ``tokenizer.json``, a ``vocab.json``, or a SentencePiece or tiktoken file.
        raw: its bytes.

    Returns:
        Its tokens, without those of other files.

    Raises:
        CompanionError: the file is malformed.
    """
    kind = path.name
    if kind not in ("tokenizer.json", "vocab.json"):
        kind = "tiktoken" if _TIKTOKEN.match(raw) or ".tiktoken" in kind else "sentencepiece"
    key = kind, xxhash.xxh3_128_hexdigest(raw)
    table = _cache.get(key)
    if table is None:
        by_id, special = _PARSERS[kind](raw, path)
        table = make_table(by_id, special, kind, path)
        _cache[key] = table
        for stale in list(_cache)[:-4]:
            _cache.pop(stale, None)
    return table


def make_table(
    by_id: Mapping[int, str], special: Iterable[int], kind: str, where: Path
) -> TokenTable:
    """Make a table of these tokens; tokens that look reserved become special too.

    Raises:
        CompanionError: there are none, or an id is far larger than the number of tokens.
    """
    if not by_id:
        raise CompanionError(where, "has no tokens", REMEDY)
    last = max(by_id)
    if last >= _FREE_IDS + _SPARSE * len(by_id):
        problem = f"the id of {by_id[last][:40]!r} is {last}, but it has only {len(by_id)} tokens"
        raise CompanionError(where, problem, REMEDY)
    row: list[str | None] = [None] * (last + 1)
    for token_id, token in by_id.items():
        row[token_id] = token
    reserved = (
        i
        for i, token in by_id.items()
        if len(token) <= _LONGEST_RESERVED and _RESERVED.fullmatch(token)
    )
    tokens = tuple(row)
    return TokenTable(tokens, frozenset((*special, *reserved)), kind, fingerprint_tokens(tokens))


def _from_tokenizer_json(raw: bytes, where: Path) -> tuple[dict[int, str], set[int]]:
    document = parse_object(raw, where)
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        by_id = dict(enumerate(_unigram_piece(entry, where) for entry in vocab))
    else:
        by_id = tokens_by_id(vocab, where)
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise malformed(where, "added_tokens", "a list", entries)
    special = set()
    for added in [read_added(entry, where, None) for entry in entries]:
        known = by_id.setdefault(added.token_id, added.token)
        if known != added.token:
            raise named_twice(where, added.token_id, known, added.token)
        if is_special(added):
            special.add(added.token_id)
    return by_id, special


def _from_vocab_json(raw: bytes, where: Path) -> tuple[dict[int, str], set[int]]:
    return tokens_by_id(parse_object(raw, where), where), set()


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
        raise CompanionError(where, problem, REMEDY) from exc
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
            raise ValueError(f"a field of {size} bytes where {end - at} are left")
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
    raise ValueError("an unterminated number")


def _from_tiktoken(raw: bytes, where: Path) -> tuple[dict[int, str], set[int]]:
    """Lines of base64 and rank; bytes are written as ``tokenizer.json`` would write them."""
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
            raise CompanionError(where, problem, REMEDY) from exc
        known = by_id.setdefault(token_id, token)
        if known != token:
            raise named_twice(where, token_id, known, token)
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


def is_special(added: AddedToken) -> bool:
    """Whether an added token is special: flagged so, or written as markup."""
    return added.flagged or _MARKUP.fullmatch(added.token) is not None


def tokens_by_id(vocab: object, where: Path) -> dict[int, str]:
    """Tokens by id, from an object of ids by token in the file ``where``.

    Raises:
        CompanionError: it is not such an object, or an id is invalid or repeated.
    """
    if not isinstance(vocab, dict):
        raise malformed(where, "the vocabulary", "an object of ids by token", vocab)
    by_id: dict[int, str] = {}
    for token, token_id in vocab.items():
        known = by_id.setdefault(_check_id(token_id, token, where), token)
        if known is not token:
            raise named_twice(where, token_id, known, token)
    return by_id


def _unigram_piece(entry: object, where: Path) -> str:
    if not (isinstance(entry, list) and entry and isinstance(entry[0], str)):
        raise malformed(where, "a Unigram piece", "a list of text and score", entry)
    return entry[0]


def read_added(entry: object, where: Path, key: str | None) -> AddedToken:
    """Read an entry of ``added_tokens``, or of ``added_tokens_decoder``, whose keys are ids.

    Raises:
        CompanionError: it has no content, or no valid id.
    """
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str):
        raise malformed(where, "an added token", "an object with its content", entry)
    try:
        token_id = entry.get("id") if key is None else _digits(key)
    except ValueError as exc:
        raise malformed(where, "the id of an added token", "a number", key) from exc
    return AddedToken(_check_id(token_id, content, where), content, entry.get("special") is True)


def _digits(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{text[:20]!r} is no id")
    return int(text)


def _check_id(token_id: object, token: str, where: Path) -> int:
    if isinstance(token_id, bool) or not isinstance(token_id, int):
        raise malformed(where, f"the id of {token[:40]!r}", "a whole number", token_id)
    if not 0 <= token_id < MAX_TOKENS:
        problem = (
            f"the id of {token[:40]!r} is {reprlib.repr(token_id)}, expected 0 to {MAX_TOKENS - 1}"
        )
        raise CompanionError(where, problem, REMEDY)
    return token_id


def malformed(where: Path, what: str, expected: str, found: object) -> CompanionError:
    """The error for a value of the wrong kind."""
    problem = f"{what} must be {expected}, but is {reprlib.repr(found)}"
    return CompanionError(where, problem, REMEDY)


def named_twice(where: Path, token_id: int, first: str, second: str) -> CompanionError:
    """The error for an id with two tokens."""
    problem = f"id {token_id} is both {first[:40]!r} and {second[:40]!r}"
    return CompanionError(where, problem, "keep one of them: a row has one token")
