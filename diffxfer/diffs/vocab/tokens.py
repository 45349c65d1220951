"""Tokenizers: the token of each row of an embedding, from any of the known files.

No tokenizer library is used: libraries renumber added tokens, need code for some formats, and load
merges that are not needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.beside import Beside
from diffxfer.diffs.vocab.token_files import (
    REMEDY,
    AddedToken,
    TokenTable,
    is_special,
    make_table,
    malformed,
    named_twice,
    read_added,
    read_table,
    tokens_by_id,
)
from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
SPECIALS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""The files that state which tokens are special."""
_DECISIVE = ("bos", "eos", "pad")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The token of each row of an embedding, and the tokens that the model uses.

    Attributes:
        tokens: token strings by id, None for a hole; the last one is not a hole.
        special: ids of special tokens: added tokens that are flagged special or written as markup
            (``<tool_call>``), and tokens that look reserved.
        chat_templates: the text of every chat template, concatenated.
        named: ids by role, such as ``{"eos": (128001, 128009)}``, from the tokenizer's files and
            from the configs.
        format: ``"tokenizer.json"``, ``"vocab.json"``, ``"sentencepiece"`` or ``"tiktoken"``.
        fingerprint: the xxh3_128 hex digest of ``tokens``, independent of the file format.
    """

    tokens: tuple[str | None, ...]
    special: frozenset[int]
    chat_templates: str
    named: Mapping[str, tuple[int, ...]]
    format: str
    fingerprint: str

    def ids(self) -> dict[str, int]:
        """Ids by token string; the lowest id of a duplicate string."""
        last = len(self.tokens) - 1
        ids = dict(zip(reversed(self.tokens), range(last, -1, -1), strict=True))
        return {token: i for token, i in ids.items() if token is not None}

    def use(self, token_id: int) -> str:
        """What the model uses a token for: ``"bos"``, ``"eos"``, ``"pad"``, ``"chat template"``.

        A template is searched for special tokens only, because its text has many regular tokens.

        Returns:
            The use, or ``""`` if the model does not use the token, so that it may be renamed.
        """
        for role in _DECISIVE:
            if token_id in self.named.get(role, ()):
                return role
        if token_id in self.special and (self.tokens[token_id] or "\0") in self.chat_templates:
            return "chat template"
        return ""

    def matters(self, token_id: int) -> bool:
        """Whether the model's behaviour depends on a token: see `use`."""
        return bool(self.use(token_id))


def read_tokenizer(where: Path | Beside) -> Tokenizer | None:
    """Read the tokenizer of a checkpoint.

    ``tokenizer.json`` comes first, then ``vocab.json``, then ``tokenizer.model`` (SentencePiece
    or tiktoken), then ``*.tiktoken``. Tokens of ``added_tokens.json`` and of the
    ``added_tokens_decoder`` in ``tokenizer_config.json`` are added to it. Files with the same
    bytes are parsed once.

    Args:
        where: the checkpoint's folder, or its companions.

    Returns:
        The tokenizer, or None if there is none of these files.

    Raises:
        CompanionError: one of its files is unsafe, unreadable or malformed.
    """
    files = where if isinstance(where, Beside) else Beside(where)
    found = table_file(files)
    if found is None:
        return None
    name, raw = found
    path = files.where(name)
    table = _overlay(read_table(path, raw), _later_tokens(files), path)
    tokens, special, kind, fingerprint = table
    return Tokenizer(
        tokens=tokens,
        special=special,
        chat_templates="\n".join(text for _, text in read_templates(files)),
        named=_named(files, tokens),
        format=kind,
        fingerprint=fingerprint,
    )


def table_file(files: Beside) -> tuple[str, bytes] | None:
    """The name and bytes of the file that lists the vocabulary, None if there is none.

    Raises:
        CompanionError: it is unsafe or unreadable.
    """
    names = ["tokenizer.json", "vocab.json", "tokenizer.model"]
    contents = (
        (name, files.read(name))
        for name in (*names, *files.matching("*.tiktoken"), "tiktoken.model")
    )
    return next(((name, raw) for name, raw in contents if raw is not None), None)


def _later_tokens(files: Beside) -> list[AddedToken]:
    """The tokens in ``added_tokens.json`` and ``added_tokens_decoder``, by id."""
    listed, path = files.document("added_tokens.json"), files.where("added_tokens.json")
    found = [AddedToken(i, token, False) for i, token in tokens_by_id(listed, path).items()]
    where = files.where("tokenizer_config.json")
    decoder = files.document("tokenizer_config.json").get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise malformed(where, "added_tokens_decoder", "an object", decoder)
    found += [read_added(entry, where, key) for key, entry in decoder.items()]
    return sorted(found, key=lambda added: added.token_id)


def _overlay(table: TokenTable, later: list[AddedToken], where: Path) -> TokenTable:
    """The table with the tokens that transformers adds when it loads the tokenizer.

    A ``tokenizer.json`` takes precedence for its own tokens: only tokens that it lacks are added,
    at free ids. In other formats a special slot may be renamed, as a slow tokenizer would do.
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
            raise named_twice(where, added.token_id, str(known), added.token)
        changed = changed or known != added.token
        by_id[added.token_id] = added.token
        if is_special(added):
            special.add(added.token_id)
    if changed:
        return make_table(by_id, special, table.format, where)
    return table._replace(special=frozenset(special))


def read_templates(files: Beside) -> list[tuple[str, str]]:
    """All chat templates, in any form: the file of each, and its text.

    Raises:
        CompanionError: one is unsafe, unreadable or not text.
    """
    names = ["chat_template.jinja"]
    names += [name for name in files.more_templates() if name.endswith(".jinja")]
    contents = ((name, files.read(name)) for name in names)
    texts = [(name, _text(raw, files.where(name))) for name, raw in contents if raw is not None]
    for name in ("chat_template.json", "tokenizer_config.json"):
        templates = files.document(name).get("chat_template")
        for template in templates if isinstance(templates, list) else [templates]:
            text = template.get("template") if isinstance(template, dict) else template
            if not isinstance(text, str | None):
                raise malformed(files.where(name), "chat_template", "text", text)
            texts.append((name, text or ""))
    return [(name, text) for name, text in texts if text]


def _text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise CompanionError(path, "is not UTF-8 text", REMEDY) from exc


def _named(files: Beside, tokens: tuple[str | None, ...]) -> dict[str, tuple[int, ...]]:
    """Ids by role, in order of appearance: from the tokenizer's files, then from the configs."""
    named: dict[str, dict[int, None]] = {}
    for _, role, token in stated_roles(files):
        if token in tokens:
            named.setdefault(role, {})[tokens.index(token)] = None
    for name in ("config.json", "generation_config.json"):
        for role, token_id in _role_ids(files.where(name), files.document(name)):
            # Some configs state -1 for none, and some an id that their tokenizer lacks.
            if 0 <= token_id < len(tokens) and tokens[token_id] is not None:
                named.setdefault(role, {})[token_id] = None
    return {role: tuple(found) for role, found in named.items()}


def stated_roles(files: Beside) -> Iterator[tuple[str, str, str]]:
    """The roles that a tokenizer's files assign to tokens: file, role, and token.

    Args:
        files: a checkpoint's companions.

    Raises:
        CompanionError: a role's value is not a token.
    """
    for name in SPECIALS_FILES:
        document = files.document(name)
        for role in NAMES:
            value = document.get(f"{role}_token")
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str):
                yield name, role, token
            elif value is not None:
                raise malformed(files.where(name), f"{role}_token", "text", value)


def _role_ids(where: Path, document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    inner = document.get("text_config")
    for level in (document, inner if isinstance(inner, dict) else {}):
        for role in _DECISIVE:
            value = level.get(f"{role}_token_id")
            for token_id in value if isinstance(value, list) else [value]:
                if isinstance(token_id, int) and not isinstance(token_id, bool):
                    yield role, token_id
                elif token_id is not None:
                    raise malformed(where, f"{role}_token_id", "an id or a list of ids", value)
