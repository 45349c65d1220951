"""Changing keys of a JSON file without changing any other byte.

Loading and dumping would also change the spelling of numbers (``1e-06``, ``500000.0``), escapes,
spaces and lists on one line. So the text is split into its members, and only members that change
are rewritten, in the file's own style.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# From the outermost key to the innermost; a number is an index of an array.
KeyPath = tuple[str | int, ...]
# New values by top-level key, by path, or both.
Changes = Mapping[str | KeyPath, Any] | Mapping[str, Any] | Mapping[KeyPath, Any]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_INDENT = re.compile(r"[{\[]\r?\n([ \t]*)")
_REMOVED = object()


class _Set(NamedTuple):
    value: Any


class _Member(NamedTuple):
    """The position in the text of an object's member or an array's item."""

    key: str | int
    start: int
    value: int
    end: int


class _Style(NamedTuple):
    """The file's style for new members; ``comma`` is the separator of items on one line."""

    indent: str | None
    ascii: bool
    colon: str
    comma: str


def edit_json(
    raw: bytes,
    changes: Changes,
    removals: Iterable[str | KeyPath] = (),
) -> bytes:
    r"""Set and remove keys in a JSON document.

    >>> edit_json(b'{"eps": 1E-6, "pad": null}\n', {"pad": 0, "eos": [1, 2]})
    b'{"eps": 1E-6, "pad": 0, "eos": [1, 2]}\n'

    Args:
        raw: a document that `parse_json` has accepted.
        changes: new values by top-level key or by path; a missing key is added at the end of its
            object (missing parent objects are created), and an index one past the end appends to
            its array.
        removals: keys or paths to remove; missing ones are ignored.

    Returns:
        The document; ``raw`` itself if no value changes.
    """
    edits: dict[str | int, Any] = {}
    for path, value in changes.items():
        _plant(edits, path, _Set(value))
    for path in removals:
        _plant(edits, path, _REMOVED)
    text = raw.decode("utf-8")
    start = _skip(text, 0)
    _, end = _DECODER.raw_decode(text, start)
    edited = _rewrite(text, start, edits, _style(text), 0)
    return raw if edited == text[start:end] else (text[:start] + edited + text[end:]).encode()


def _plant(tree: dict[str | int, Any], path: str | KeyPath, leaf: object) -> None:
    keys: KeyPath = (path,) if isinstance(path, str) else path
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = leaf


def _style(text: str) -> _Style:
    """The style of a whole file, for new members without a neighbour to imitate.

    If nothing shows whether the file escapes non-ASCII characters, they are not escaped.
    """
    indent = _INDENT.search(text)
    escapes = text.isascii() and re.search(r"\\u(?!00[01])[0-9a-fA-F]{4}", text) is not None
    tight = re.search(r'":\S', text) is not None and '": ' not in text
    colon, comma = (":", ",") if tight else (": ", ", ")
    return _Style(indent[1] if indent else None, escapes, colon, comma)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match
    return match.end()


def _members(text: str, at: int) -> tuple[list[_Member], int]:
    """The members of the container that opens at ``at``, and where it closes."""
    is_object = text[at] == "{"
    members: list[_Member] = []
    at = _skip(text, at + 1)
    while text[at] not in "}]":
        start, key = at, len(members)
        if is_object:
            key, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # past the colon
        _, end = _DECODER.raw_decode(text, at)
        members.append(_Member(key, start, at, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return members, at


def _rewrite(text: str, at: int, edits: Mapping[str | int, Any], style: _Style, depth: int) -> str:
    """The text of the container that opens at ``at``, with the edits applied."""
    members, close = _members(text, at)
    comma = _comma(text, at, members, style, depth)
    kept = _kept(text, members, edits, style, depth)
    known = {member.key for member in members}
    for key, edit in edits.items():
        if key not in known and (value := _fresh(edit)) is not _REMOVED:
            name = (
                json.dumps(key, ensure_ascii=style.ascii) + style.colon if text[at] == "{" else ""
            )
            kept.append((comma if kept else "") + name + _dump(value, style, depth + 1))
    inside = "".join(kept)
    if inside and members:
        return text[at : members[0].start] + inside + text[members[-1].end : close + 1]
    if inside and style.indent is not None:
        inside = comma[1:] + inside + "\n" + style.indent * depth
    return text[at] + inside + text[close]


def _kept(
    text: str,
    members: list[_Member],
    edits: Mapping[str | int, Any],
    style: _Style,
    depth: int,
) -> list[str]:
    """The members that stay, edited; each but the first with the separator before it."""
    # Of two members with the same name the last counts, as for every JSON reader.
    last = {member.key: index for index, member in enumerate(members)}
    kept: list[str] = []
    for index, member in enumerate(members):
        edit = edits.get(member.key)
        if edit is _REMOVED:
            continue
        gap = text[members[index - 1].end : member.start] if kept else ""
        value = text[member.value : member.end]
        if edit is not None and last[member.key] == index:
            value = _edited(text, member, edit, style, depth)
        kept.append(gap + text[member.start : member.value] + value)
    return kept


def _edited(text: str, member: _Member, edit: Any, style: _Style, depth: int) -> str:
    old = text[member.value : member.end]
    if isinstance(edit, dict) and old[0] in "{[":
        return _rewrite(text, member.value, edit, style, depth + 1)
    value = _fresh(edit)
    # Compared as text, since 1, 1.0 and true are equal in Python.
    if value is _REMOVED or json.dumps(value) == json.dumps(_DECODER.decode(old)):
        return old
    return _dump(value, style, depth + 1)


def _fresh(edit: Any) -> Any:
    """The value that an edit creates for a missing key, or `_REMOVED`."""
    if isinstance(edit, _Set):
        return edit.value
    if edit is _REMOVED:
        return _REMOVED
    inner = {key: value for key, e in edit.items() if (value := _fresh(e)) is not _REMOVED}
    return inner or _REMOVED


def _comma(text: str, at: int, members: list[_Member], style: _Style, depth: int) -> str:
    """The separator of members in the container that opens at ``at``."""
    if len(members) > 1:
        return text[members[0].end : members[1].start]
    if members:
        lead = text[at + 1 : members[0].start]
        return "," + lead if "\n" in lead else style.comma
    return style.comma if style.indent is None else ",\n" + style.indent * (depth + 1)


def _dump(value: Any, style: _Style, depth: int) -> str:
    text = json.dumps(
        value,
        indent=style.indent,
        ensure_ascii=style.ascii,
        separators=("," if style.indent is not None else style.comma, style.colon),
    )
    return text.replace("\n", "\n" + (style.indent or "") * depth)
