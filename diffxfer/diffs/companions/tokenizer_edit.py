"""Adding finetuned's new tokens to the target's tokenizer, and renaming reserved tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import companion_path, optional_object, read_bytes
from diffxfer.checkpoints.json_edit import KeyPath, edit_json
from diffxfer.checkpoints.json_read import parse_object
from diffxfer.diffs.companions.special_tokens import Vocabulary
from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenEdits:
    """The changes to the target's tokenizer, by output id.

    Attributes:
        additions: tokens to add.
        renamed: new names of existing tokens.
        old: the target's names of the renamed tokens.
        flags: finetuned's attributes of these tokens, such as ``{"special": True}``.
    """

    additions: Mapping[int, str]
    renamed: Mapping[int, str]
    old: Mapping[int, str]
    flags: Mapping[int, Mapping[str, bool]]

    def __bool__(self) -> bool:
        return bool(self.additions or self.renamed)

    def new_flags(self, token_id: int) -> dict[str, bool]:
        """All attributes of a new entry; those that finetuned does not state get the defaults."""
        stated = self.flags.get(token_id, {})
        plain = dict.fromkeys(_FLAGS, False) | {"normalized": not stated.get("special", False)}
        return {**plain, **stated}


def added_token_flags(folder: Path) -> dict[int, dict[str, bool]]:
    """The attributes of a tokenizer's added tokens, by id.

    Args:
        folder: the checkpoint; its ``tokenizer.json`` takes precedence over the
            ``added_tokens_decoder`` of ``tokenizer_config.json``.

    Returns:
        For each added token, the attributes that are stated, of five.

    Raises:
        CompanionError: a tokenizer file is unsafe or no JSON object.
    """
    decoder = optional_object(folder, "tokenizer_config.json").get("added_tokens_decoder")
    entries = list(decoder.items()) if isinstance(decoder, dict) else []
    added = optional_object(folder, "tokenizer.json").get("added_tokens")
    listed = (
        [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    )
    entries += [(str(entry.get("id")), entry) for entry in listed]
    return {
        int(key): {flag: entry[flag] for flag in _FLAGS if isinstance(entry.get(flag), bool)}
        for key, entry in entries
        if isinstance(entry, dict) and key.isdecimal() and len(key) < 20
    }


def edited_vocabulary(vocabulary: Vocabulary, edits: TokenEdits) -> Vocabulary:
    """The target's tokens with the edits applied."""
    names = {**vocabulary.names, **edits.renamed, **edits.additions}
    old = set(edits.old.values())
    ids = {token: token_id for token, token_id in vocabulary.ids.items() if token not in old}
    for token_id, token in sorted({**edits.renamed, **edits.additions}.items()):
        ids[token] = token_id
    return Vocabulary(names, ids)


def edited_tokenizer(target: Path, edits: TokenEdits) -> dict[str, bytes]:
    """The target's tokenizer files that change, except ``tokenizer_config.json``.

    Args:
        target: the target's folder.
        edits: the tokens to add and to rename, at least one.

    Returns:
        New contents by name: ``tokenizer.json``, and ``added_tokens.json`` and ``vocab.json`` if
        the target has them and they change.

    Raises:
        CompanionError: the target has no ``tokenizer.json``, or the edited one gives a token a
            different id than its row in the embedding.
    """
    path = companion_path(target, "tokenizer.json")
    if path is None:
        raise CompanionError(
            target,
            "has its tokenizer only as SentencePiece or vocab.json, which cannot take added tokens",
            "convert it to tokenizer.json first "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))",
        )
    raw = read_bytes(path)
    document = parse_object(raw, path)
    changes, removals = _vocabulary_changes(document, edits)
    changes.update(_added_changes(document, edits))
    new = edit_json(raw, changes, removals)
    _verify(new, edits, path)
    files = {"tokenizer.json": new}
    for name, additions in (("added_tokens.json", edits.additions), ("vocab.json", {})):
        beside = companion_path(target, name)
        if beside is not None:
            files[name] = _edited_map(beside, edits, additions)
    return files


def _vocabulary_changes(
    document: Mapping[str, Any], edits: TokenEdits
) -> tuple[dict[str | KeyPath, Any], list[KeyPath]]:
    """Rename slots in ``model``, where some tokenizers list their reserved tokens too."""
    changes: dict[str | KeyPath, Any] = {}
    removals: list[KeyPath] = []
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    for token_id, token in edits.renamed.items():
        old = edits.old.get(token_id)
        if isinstance(vocabulary, dict) and old is not None and old in vocabulary:
            removals.append(("model", "vocab", old))
            changes["model", "vocab", token] = token_id
        elif isinstance(vocabulary, list) and token_id < len(vocabulary):
            changes["model", "vocab", token_id, 0] = token
        if isinstance(model, dict) and old is not None and model.get("unk_token") == old:
            changes["model", "unk_token"] = token
    return changes, removals


def _added_changes(document: Mapping[str, Any], edits: TokenEdits) -> dict[str | KeyPath, Any]:
    """Add tokens and rename slots in ``added_tokens``."""
    changes: dict[str | KeyPath, Any] = {}
    entries = document.get("added_tokens")
    entries = entries if isinstance(entries, list) else []
    index = {entry.get("id"): i for i, entry in enumerate(entries) if isinstance(entry, dict)}
    appended: list[dict[str, Any]] = []
    for token_id, token in sorted({**edits.renamed, **edits.additions}.items()):
        if token_id in index and token_id in edits.renamed:
            changes["added_tokens", index[token_id], "content"] = token
            for flag, value in edits.flags.get(token_id, {}).items():
                changes["added_tokens", index[token_id], flag] = value
        elif token_id in edits.additions or token_id in edits.flags:
            appended.append({"id": token_id, "content": token, **edits.new_flags(token_id)})
    if not entries and appended:
        return {"added_tokens": appended}
    for i, entry in enumerate(appended, start=len(entries)):
        changes["added_tokens", i] = entry
    return changes


def _verify(raw: bytes, edits: TokenEdits, where: Path) -> None:
    """Load the tokenizer and check the ids: it assigns the next free id, ignoring the file's."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as exc:  # the library raises no narrower class
        raise CompanionError(
            where,
            f"no longer loads after finetuned's tokens are added ({exc})",
            "save the target's tokenizer again with a current version of transformers",
        ) from exc
    for token_id, token in sorted({**edits.renamed, **edits.additions}.items()):
        found = tokenizer.token_to_id(token)
        if found != token_id:
            raise CompanionError(
                where,
                f"finetuned's token {token!r} must have id {token_id}, but gets "
                + ("none" if found is None else str(found)),
                "save the target's tokenizer again with a current version of transformers, or "
                "remove the token from finetuned",
            )


def _edited_map(path: Path, edits: TokenEdits, additions: Mapping[int, str]) -> bytes:
    """A file of ids by token (``added_tokens.json``, ``vocab.json``)."""
    raw = read_bytes(path)
    document = parse_object(raw, path)
    changes: dict[str | KeyPath, Any] = {(token,): i for i, token in sorted(additions.items())}
    removals: list[KeyPath] = []
    for token_id, token in sorted(edits.renamed.items()):
        old = edits.old.get(token_id)
        if old is not None and old in document:
            removals.append((old,))
            changes[token,] = token_id
    return edit_json(raw, changes, removals)


def decoder_changes(target: Path, edits: TokenEdits) -> dict[str | KeyPath, Any]:
    """The changes to ``added_tokens_decoder`` in the target's ``tokenizer_config.json``."""
    decoder = optional_object(target, "tokenizer_config.json").get("added_tokens_decoder")
    changes: dict[str | KeyPath, Any] = {}
    if not isinstance(decoder, dict):
        return changes
    for token_id, token in sorted({**edits.renamed, **edits.additions}.items()):
        key = ("added_tokens_decoder", str(token_id))
        entry = decoder.get(str(token_id))
        if token_id in edits.renamed and isinstance(entry, dict):
            changes[key] = {**entry, "content": token, **edits.flags.get(token_id, {})}
        elif token_id in edits.additions or token_id in edits.flags:
            changes[key] = dict(sorted({"content": token, **edits.new_flags(token_id)}.items()))
    return changes
