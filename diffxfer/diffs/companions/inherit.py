"""The companions of a graft: architecture from the target, behaviour from finetuned.

The files start as byte-for-byte copies of the target's. The behaviour that fine-tuning sets outside
the weights (chat template, stop tokens, sampling settings) then comes from finetuned, with every
token id translated to the target's vocabulary. This module writes no files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import (
    TEMPLATE_FOLDER,
    is_code,
    list_companions,
    optional_object,
    read_bytes,
    read_config,
)
from diffxfer.checkpoints.encodings.quantization_config import paths_to_quantization
from diffxfer.checkpoints.json_edit import Changes, KeyPath, edit_json
from diffxfer.checkpoints.json_read import parse_json, parse_object
from diffxfer.checkpoints.quantized import CONFIG_FILES
from diffxfer.diffs.companions.config_edit import (
    config_changes,
    generation_changes,
    model_token_ids,
    paths_to,
)
from diffxfer.diffs.companions.head_config import head_changes
from diffxfer.diffs.companions.special_tokens import (
    Translation,
    Vocabulary,
    output_specials,
    read_vocabulary,
    setting_changes,
    stated_specials,
    token_names,
)
from diffxfer.diffs.companions.tokenizer_edit import (
    TokenEdits,
    added_token_flags,
    decoder_changes,
    edited_tokenizer,
    edited_vocabulary,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer_config.json"
_SPECIALS = "special_tokens_map.json"
_PROCESSOR = "processor_config.json"
_JINJA = "chat_template.jinja"
# Files that hold only a chat template.
_TEMPLATE_FILES = (_JINJA, "chat_template.json")
_SIDES = ("padding_side", "truncation_side")


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The companions of an output.

    Attributes:
        files: by name in the output, the new bytes, or the path of a file to copy unchanged.
        left_out: files of the target (of finetuned, for a diff vector) that are not copied.
        warnings: what a user should know, one sentence each.
    """

    files: Mapping[str, bytes | Path]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Draft:
    """An `Inheritance` in the making."""

    target: Path
    behaviour: Path
    theirs: frozenset[str]
    files: dict[str, bytes | Path]
    left_out: list[str]
    warnings: list[str] = field(default_factory=list)

    def edit(
        self,
        name: str,
        changes: Changes,
        removals: Iterable[str | KeyPath] = (),
    ) -> None:
        """Change keys of a JSON file of the draft; the file stays a copy if nothing changes."""
        source = self.files[name]
        raw = source if isinstance(source, bytes) else read_bytes(source)
        if not isinstance(source, bytes):
            parse_object(raw, source)
        edited = edit_json(raw, changes, removals)
        if edited is not raw:
            self.files[name] = edited

    def bring(self, name: str) -> None:
        """Take one of finetuned's files, without references to code."""
        self.files[name] = _without_code(self.behaviour / name)

    def done(self) -> Inheritance:
        files = dict(sorted(self.files.items()))
        return Inheritance(files, tuple(sorted(self.left_out)), tuple(self.warnings))


def diff_companions(finetuned: Path) -> Inheritance:
    """The companions of finetuned that a diff vector stores: all but code.

    Args:
        finetuned: finetuned's folder.

    Returns:
        Its companions except ``*.py``, with ``auto_map`` removed from every JSON file.

    Raises:
        CompanionError: a companion is unsafe or broken.
    """
    listing = list_companions(finetuned)
    files = {name: _without_code(finetuned / name) for name in listing.names if not is_code(name)}
    code = [name for name in listing.names if is_code(name)]
    return Inheritance(files, tuple(sorted((*listing.left_out, *code))), ())


def inherit_companions(
    target: Path,
    behaviour: Path,
    *,
    translate: Mapping[int, int] | None,
    additions: Mapping[int, str],
    added_source: Mapping[int, int],
    renamed: Mapping[int, str],
    vocab_size: int | None,
    dtype: str | None,
    head: bool = False,
    decoded: bool = False,
) -> Inheritance:
    """The companions of a graft.

    Args:
        target: the target's folder.
        behaviour: finetuned's folder, or the ``companions`` of a diff vector.
        translate: finetuned's token ids to the output's; None if no id changes.
        additions: output id to token, for tokens that finetuned added and the target lacks.
        added_source: output id to finetuned id, for ``additions``.
        renamed: output id to its new token, for reserved tokens that finetuned renamed.
        vocab_size: the new size of the vocabulary, if the embedding grew.
        dtype: the new dtype's name, such as ``"float32"``, if it is not the target's.
        head: whether finetuned brings a task head, which the config then describes.
        decoded: whether the target is quantised, and the output is not.

    Returns:
        The companions; no file outside the two folders is read.

    Raises:
        CompanionError: a companion is unsafe or broken, finetuned's bos, eos or pad token has no
            place in the output, or the target's tokenizer cannot take a token.
    """
    listing = list_companions(target)
    theirs = list_companions(behaviour).names
    files: dict[str, bytes | Path] = {name: target / name for name in listing.names}
    draft = _Draft(target, behaviour, frozenset(theirs), files, list(listing.left_out))
    vocabulary = read_vocabulary(target)
    edits = _token_edits(behaviour, vocabulary, translate, additions, added_source, renamed)
    output = None if vocabulary is None else edited_vocabulary(vocabulary, edits)
    translation = Translation(read_vocabulary(behaviour), output, translate)
    if edits:
        files.update(edited_tokenizer(target, edits))
    configs = read_config(target), read_config(behaviour)
    where = behaviour / _CONFIG
    config = config_changes(*configs, translation, where, vocab_size=vocab_size, dtype=dtype)
    removals: list[str | KeyPath] = []
    if head:
        described, removals = head_changes(*configs, where)
        config |= described
    removals += _drop_quantization(draft, configs[0]) if decoded else []
    draft.edit(_CONFIG, config, removals)
    _inherit_generation(draft, translation)
    _inherit_specials(draft, translation, edits)
    _inherit_templates(draft)
    _warn_of_absences(draft, translation)
    return draft.done()


def _drop_quantization(draft: _Draft, config: Mapping[str, Any]) -> list[str | KeyPath]:
    """Drop the files that describe how the target is quantised; returns the config's keys."""
    draft.files = {name: path for name, path in draft.files.items() if name not in CONFIG_FILES}
    return [*paths_to_quantization(config)]


def _token_edits(
    behaviour: Path,
    vocabulary: Vocabulary | None,
    translate: Mapping[int, int] | None,
    additions: Mapping[int, str],
    added_source: Mapping[int, int],
    renamed: Mapping[int, str],
) -> TokenEdits:
    if not (additions or renamed):
        return TokenEdits({}, {}, {}, {})
    source = {output: finetuned for finetuned, output in (translate or {}).items()}
    source.update(added_source)
    stated = added_token_flags(behaviour)
    ids = (*additions, *renamed)
    flags = {i: stated[f] for i in ids if (f := source.get(i, i)) in stated}
    old = {i: vocabulary.names[i] for i in renamed if vocabulary and i in vocabulary.names}
    return TokenEdits(dict(additions), dict(renamed), old, flags)


def _inherit_generation(draft: _Draft, translation: Translation) -> None:
    """Take finetuned's generation settings; or the target's, with the ids of finetuned's config."""
    where = draft.behaviour / _GENERATION
    if _GENERATION in draft.theirs:
        document = optional_object(draft.behaviour, _GENERATION)
        changes, removals = generation_changes(document, translation, where)
        draft.bring(_GENERATION)
        draft.edit(_GENERATION, changes, removals)
        draft.warnings += [
            f"generation_config.json: {key} is removed, since finetuned has no such token"
            for key in removals
        ]
    elif _GENERATION in draft.files:
        config = read_config(draft.behaviour)
        ids = model_token_ids(config, translation, draft.behaviour / _CONFIG)
        draft.edit(_GENERATION, ids)


def _inherit_specials(draft: _Draft, translation: Translation, edits: TokenEdits) -> None:
    """Take finetuned's special tokens, in the two files that state them."""
    stated = stated_specials(draft.behaviour)
    config = optional_object(draft.behaviour, _TOKENIZER)
    where = draft.behaviour / (_TOKENIZER if config else _SPECIALS)
    specials, warnings = output_specials(stated, translation, where)
    draft.warnings += [f"{where.name}: {warning}" for warning in warnings]
    sides = {key: config[key] for key in _SIDES if key in config}
    renamed = {edits.old[i]: token for i, token in edits.renamed.items() if i in edits.old}
    if _TOKENIZER in draft.files:
        document = optional_object(draft.target, _TOKENIZER)
        changes, removals = setting_changes(document, specials | sides, renamed)
        draft.edit(_TOKENIZER, changes | decoder_changes(draft.target, edits), removals)
    elif _TOKENIZER in draft.theirs:
        draft.bring(_TOKENIZER)
        lost = [key for key in stated if key not in specials]
        draft.edit(_TOKENIZER, specials, ["added_tokens_decoder", "model_max_length", *lost])
    if _SPECIALS in draft.theirs:
        document = optional_object(draft.behaviour, _SPECIALS)
        draft.bring(_SPECIALS)
        # transformers treats every key of this file as a tokenizer setting.
        foreign = [key for key in document if key not in specials]
        draft.edit(
            _SPECIALS,
            {
                key: value
                for key, value in specials.items()
                if key in document and token_names(value) != token_names(document[key])
            },
            foreign,
        )
    elif _SPECIALS in draft.files:
        document = optional_object(draft.target, _SPECIALS)
        changes, removals = setting_changes(document, specials, renamed)
        nulls = [key for key, value in changes.items() if value is None]
        draft.edit(_SPECIALS, changes, [*removals, *nulls])


def _inherit_templates(draft: _Draft) -> None:
    """Take finetuned's chat templates, in all its forms; if it has none, keep the target's."""
    files = [name for name in draft.theirs if _is_template(name)]
    keys = {
        name: template
        for name in (_TOKENIZER, _PROCESSOR)
        if (template := optional_object(draft.behaviour, name).get("chat_template"))
    }
    if not files and not keys:
        return
    for name in [name for name in draft.files if _is_template(name)]:
        del draft.files[name]
        if name not in files:
            draft.left_out.append(name)
    for name in (_TOKENIZER, _PROCESSOR):
        if name in draft.files:
            changes = {"chat_template": keys[name]} if name in keys else {}
            draft.edit(name, changes, () if changes else ("chat_template",))
    for name in files:
        draft.bring(name)
    homeless = keys.get(_PROCESSOR) if _PROCESSOR not in draft.files else None
    if isinstance(homeless, str) and _JINJA not in draft.files:
        draft.files[_JINJA] = homeless.encode()


def _is_template(name: str) -> bool:
    return name in _TEMPLATE_FILES or name.startswith(f"{TEMPLATE_FOLDER}/")


def _warn_of_absences(draft: _Draft, translation: Translation) -> None:
    code = sorted(name for name in draft.theirs if is_code(name))
    if code:
        draft.warnings.append(
            f"finetuned's code ({', '.join(code)}) is not copied: code comes only from the target"
        )
    if translation.output is None and translation.finetuned is not None:
        draft.warnings.append("the target has no tokenizer, so the output has none either")


def _without_code(path: Path) -> bytes | Path:
    """The file, or its bytes without ``auto_map`` if it is JSON that has one."""
    if not path.name.lower().endswith(".json"):
        return path
    raw = read_bytes(path)
    code = paths_to("auto_map", parse_json(raw, path))
    return edit_json(raw, {}, code) if code else path
