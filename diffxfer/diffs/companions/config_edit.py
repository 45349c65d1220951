"""Changes to the target's ``config.json`` and to finetuned's ``generation_config.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.text_config import TEXT_CONFIGS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.json_edit import KeyPath
    from diffxfer.diffs.companions.special_tokens import Translation

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Generation settings that hold ids and do not end in `_token_id` or `_token_ids`; the last two
# are Whisper's.
_ID_SETTINGS = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "force_words_ids",
    "lang_to_id",
    "task_to_id",
)
# Lists of pairs, and the position in the pair that holds ids.
_PAIRED = {"forced_decoder_ids": 1, "sequence_bias": 0}
# The rows of Gemma 3n's second embedding.
_PER_LAYER = "vocab_size_per_layer_input"
_NONE = object()


def config_changes(
    target: Mapping[str, Any],
    finetuned: Mapping[str, Any],
    translation: Translation,
    where: Path,
    *,
    vocab_size: int | None,
    dtype: str | None,
) -> dict[str | KeyPath, Any]:
    """The changes to the target's ``config.json``.

    Args:
        target: the target's config.
        finetuned: finetuned's config.
        translation: from finetuned's tokens to the output's.
        where: finetuned's config file, for error messages.
        vocab_size: the new size of the vocabulary, if it changes.
        dtype: the new dtype's name, if it changes.

    Returns:
        New values by path.

    Raises:
        CompanionError: one of finetuned's ids is a token that has no place in the output.
    """
    changes: dict[str | KeyPath, Any] = {}
    levels = _levels(target)
    for key in _IDS:
        holding = [level for level in levels if key in _at(target, level)]
        stating = [level for level in _levels(finetuned) if key in _at(finetuned, level)]
        for level in holding or [level for level in stating if level in levels][:1] or [()]:
            value = _translated_id(finetuned, level, key, translation, where)
            if value is not _NONE:
                changes[(*level, key)] = value
    if vocab_size is not None:
        sizes = (_at(target, level).get("vocab_size") for level in reversed(levels))
        old = next((size for size in sizes if type(size) is int and size), None)
        if old is None:  # the size was the class's default, which is now wrong
            changes[(*levels[-1], "vocab_size")] = vocab_size
        for path in paths_to("vocab_size", target):
            # Not if only Gemma 3n's per-layer embedding grew: it has less padding.
            if old is not None and old < vocab_size and _at(target, path[:-1])[path[-1]] == old:
                changes[path] = vocab_size
        for path in paths_to(_PER_LAYER, target):
            size = _at(target, path[:-1])[path[-1]]
            if (
                type(size) is int
                and size < vocab_size
                and (size == old or vocab_size <= (old or 0))
            ):
                changes[path] = vocab_size
    if dtype is not None:
        for path in (*paths_to("dtype", target), *paths_to("torch_dtype", target)):
            if isinstance(_at(target, path[:-1])[path[-1]], str):
                changes[path] = dtype
    return changes


def model_token_ids(
    finetuned: Mapping[str, Any], translation: Translation, where: Path
) -> dict[str, Any]:
    """The bos, eos and pad ids of finetuned's config, translated to the output's.

    Raises:
        CompanionError: one of them is a token that has no place in the output.
    """
    ids = {key: _translated_id(finetuned, (), key, translation, where) for key in _IDS}
    return {key: value for key, value in ids.items() if value is not _NONE}


def _translated_id(
    finetuned: Mapping[str, Any],
    level: KeyPath,
    key: str,
    translation: Translation,
    where: Path,
) -> Any:
    """Finetuned's id or ids at that level, or else at another; `_NONE` if none is a token."""
    values = (_at(finetuned, x).get(key) for x in (level, *_levels(finetuned)))
    value = next((value for value in values if value is not None), None)
    if value is None:
        return _NONE
    return _translated(value, translation, where, key, keep=False)


def _levels(config: Mapping[str, Any]) -> list[KeyPath]:
    """The paths of the config itself and of nested configs that describe the language model."""
    return [(), *((name,) for name in TEXT_CONFIGS if isinstance(config.get(name), dict))]


def _at(document: Any, path: KeyPath) -> Any:
    """The value at an existing path; an empty object for a missing level."""
    for key in path:
        document = document.get(key, {}) if isinstance(document, dict) else document[key]
    return document


def generation_changes(
    document: Mapping[str, Any], translation: Translation, where: Path
) -> tuple[dict[str | KeyPath, Any], list[str]]:
    """The changes to finetuned's generation settings.

    Args:
        document: finetuned's ``generation_config.json``.
        translation: from finetuned's tokens to the output's.
        where: that file, for error messages.

    Returns:
        New values by key, and the keys to remove because their ids are not tokens of finetuned
        but might be tokens of the target.

    Raises:
        CompanionError: an id is a token that has no place in the output.
    """
    changes: dict[str | KeyPath, Any] = {}
    removals: list[str] = []
    if translation.translate is None:
        return changes, removals
    for key, value in document.items():
        if key in _PAIRED and isinstance(value, list):
            changes[key] = _translated_pairs(value, _PAIRED[key], translation, where, key)
        elif key.endswith(("_token_id", "_token_ids")) or key in _ID_SETTINGS:
            new = _translated(value, translation, where, key, keep=True)
            if new is _NONE:
                removals.append(key)
            else:
                changes[key] = new
    return changes, removals


def _translated_pairs(
    pairs: list[Any], place: int, translation: Translation, where: Path, key: str
) -> list[Any]:
    kept = []
    for pair in pairs:
        if isinstance(pair, list) and len(pair) == 2:
            new = _translated(pair[place], translation, where, key, keep=True)
            if new is not _NONE:
                kept.append([*pair[:place], new, *pair[place + 1 :]])
    return kept


def _translated(value: Any, translation: Translation, where: Path, key: str, *, keep: bool) -> Any:
    """Translate ids to the output's, in the same form: a single id, a list, or an object.

    Args:
        value: the ids; values that are not ids are kept.
        translation: from finetuned's tokens to the output's.
        where: the file that states them.
        key: the key that states them.
        keep: whether to keep a negative id, which means none.

    Returns:
        The output's ids; `_NONE` if none of the ids is a token.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if keep and value < 0:
            return value
        new = translation.token_id(value, where, key)
        return _NONE if new is None else new
    if isinstance(value, list):
        items = [_translated(item, translation, where, key, keep=keep) for item in value]
        kept = [item for item in items if item is not _NONE]
        return _NONE if value and not kept else kept
    if isinstance(value, dict):
        pairs = ((k, _translated(v, translation, where, key, keep=keep)) for k, v in value.items())
        return {k: v for k, v in pairs if v is not _NONE}
    return value


def paths_to(key: str, document: Any, path: KeyPath = ()) -> list[KeyPath]:
    """The paths of a key in a JSON document, at any depth, but not inside its own values."""
    if isinstance(document, dict):
        items: Any = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    else:
        return []
    found: list[KeyPath] = []
    for name, value in items:
        if name == key:
            found.append((*path, name))
        elif isinstance(value, dict | list):
            found += paths_to(key, value, (*path, name))
    return found
