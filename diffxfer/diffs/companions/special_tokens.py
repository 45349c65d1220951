"""Translating finetuned's token ids and special tokens to the output's vocabulary.

transformers adds every special token that a tokenizer lacks as a new token, with an id past the
embedding's end. So no special token is taken over by name alone: its id determines the output's
token that replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import optional_object
from diffxfer.diffs.vocab.tokens import read_tokenizer
from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.json_edit import KeyPath

NAMED = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
LISTED = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
# A model needs these to start and stop; the others may fall back to the target's.
_NEEDED = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens by id, and its ids by token."""

    names: Mapping[int, str]
    ids: Mapping[str, int]


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of the tokenizer in ``folder``, or None if it has none.

    Raises:
        CompanionError: a tokenizer file is unsafe or broken.
    """
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        return None
    names = {i: token for i, token in enumerate(tokenizer.tokens) if token is not None}
    return Vocabulary(names, tokenizer.ids())


@dataclass(frozen=True, slots=True)
class Translation:
    """The translation of finetuned's tokens to the output's.

    Attributes:
        finetuned: finetuned's tokens; None if it has no tokenizer.
        output: the output's tokens: the target's with additions and renamed slots.
        translate: finetuned's ids to the output's; None if no id changes.
    """

    finetuned: Vocabulary | None
    output: Vocabulary | None
    translate: Mapping[int, int] | None

    def token_id(self, token_id: int, where: Path, key: str) -> int | None:
        """The output's id for a finetuned id.

        Args:
            token_id: finetuned's id.
            where: finetuned's file that states it.
            key: the key in that file.

        Returns:
            The id, or None if finetuned has no token with that id.

        Raises:
            CompanionError: finetuned has such a token, but the output has no place for it.
        """
        known = self.finetuned is None or token_id in self.finetuned.names
        if token_id < 0 or not known:
            return None
        if self.translate is None:
            return token_id
        if token_id in self.translate:
            return self.translate[token_id]
        name = repr(self.finetuned.names[token_id]) if self.finetuned else "of unknown name"
        raise _no_place(where, key, f"{token_id} ({name})")

    def token(self, token: str) -> str | None:
        """The output's name for a finetuned special token, or None if it has no such token."""
        if self.output is None:
            return token
        token_id = self.finetuned.ids.get(token) if self.finetuned else None
        if token_id is not None:
            place = token_id if self.translate is None else self.translate.get(token_id)
            name = None if place is None else self.output.names.get(place)
            if name is not None:
                return name
        return token if token in self.output.ids else None

    def exists(self, token: str) -> bool:
        """Whether finetuned's tokenizer has that token, rather than only a file that names it."""
        return self.finetuned is not None and token in self.finetuned.ids


def _no_place(where: Path, key: str, found: str) -> CompanionError:
    return CompanionError(
        where,
        f"{key} is {found}, which is not a token of the output",
        f"set {key} there to a token of the target",
    )


def stated_specials(folder: Path) -> dict[str, Any]:
    """The special tokens that the tokenizer in ``folder`` has when loaded, in its files' form.

    ``special_tokens_map.json`` counts only if ``tokenizer_config.json`` has no
    ``added_tokens_decoder``; then it takes precedence (transformers' ``_from_pretrained``).
    """
    config = optional_object(folder, "tokenizer_config.json")
    specials = {key: config[key] for key in (*NAMED, *LISTED) if key in config}
    if "added_tokens_decoder" not in config:
        stated = optional_object(folder, "special_tokens_map.json")
        specials.update({key: stated[key] for key in (*NAMED, *LISTED) if key in stated})
    return specials


def output_specials(
    specials: Mapping[str, Any], translation: Translation, where: Path
) -> tuple[dict[str, Any], list[str]]:
    """Finetuned's special tokens under the output's names.

    Args:
        specials: the result of `stated_specials`.
        translation: from finetuned's tokens to the output's.
        where: finetuned's file, for error messages.

    Returns:
        The settings that the output can have, and a warning for each that it cannot have.

    Raises:
        CompanionError: the bos, eos or pad token has no place in the output.
    """
    kept: dict[str, Any] = {}
    warnings: list[str] = []
    for key, value in specials.items():
        lost: list[str] = []

        def rename(token: str, lost: list[str] = lost) -> str | None:
            name = translation.token(token)
            if name is None:
                lost.append(token)
            return name

        renamed = renamed_tokens(value, rename)
        if lost and key in _NEEDED and translation.exists(lost[0]):
            raise _no_place(where, key, repr(lost[0]))
        if lost:
            warnings.append(
                f"{key}: the output's tokenizer has no "
                + ", ".join(map(repr, lost))
                + (", so the target's setting is kept" if key in NAMED else ", so it is left out")
            )
        if not (lost and key in NAMED):
            kept[key] = renamed
    return kept, warnings


def renamed_tokens(value: Any, rename: Callable[[str], str | None]) -> Any:
    """A special-token setting with each token renamed; those renamed to None are left out.

    Args:
        value: a token, an AddedToken object, or a list or an object of these.
        rename: gives a token's new name.

    Returns:
        A value of the same form; None for a single token that is left out.
    """
    if isinstance(value, str):
        return rename(value)
    if isinstance(value, list):
        return [new for item in value if (new := renamed_tokens(item, rename)) is not None]
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        name = rename(value["content"])
        return None if name is None else {**value, "content": name}
    if isinstance(value, dict):
        pairs = ((key, renamed_tokens(item, rename)) for key, item in value.items())
        return {key: item for key, item in pairs if item is not None}
    return value


def token_names(value: Any) -> Any:
    """A special-token setting with each AddedToken object replaced by its token."""
    if isinstance(value, list):
        return [token_names(item) for item in value]
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return value["content"]
    return value


def setting_changes(
    document: Mapping[str, Any], settings: Mapping[str, Any], renamed: Mapping[str, str]
) -> tuple[dict[str | KeyPath, Any], list[str]]:
    """The changes that finetuned's settings make to one of the target's tokenizer files.

    Args:
        document: the target's file.
        settings: finetuned's settings, under the output's names.
        renamed: new names of the target's tokens, by old name.

    Returns:
        New values by key, and the keys to remove.
    """
    # One setting with two names; `additional_special_tokens` is the older name.
    lists = LISTED[:2]
    given = any(isinstance(settings.get(key), list) for key in lists)
    replaced = [
        key
        for key in lists
        if given and key not in settings and isinstance(document.get(key), list)
    ]
    changes: dict[str | KeyPath, Any] = {
        key: renamed_tokens(document[key], lambda token: renamed.get(token, token))
        for key in (*NAMED, *LISTED)
        if key in document and key not in replaced
    }
    changes.update(
        {key: value for key, value in settings.items() if value is not None or key in document}
    )
    return changes, replaced
