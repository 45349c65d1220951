"""The licence of a checkpoint, as the front matter of its README states it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeGuard

from diffxfer.checkpoints.companions import README, companion_path, read_bytes
from diffxfer.diffs.artifact.manifest import LicenseEntry
from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from pathlib import Path

_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\n---[ \t]*\r?(\n|\Z)", re.DOTALL)
_KEYS = re.compile(r"^license(?:_name|_link)?[ \t]*:.*(?:\n(?:[ \t-].*)?)*", re.MULTILINE)
_LONGEST = 500
_LONGEST_BLOCK = 4_000


def read_license(folder: Path) -> LicenseEntry | None:
    """The licence that a checkpoint's README states.

    Args:
        folder: the checkpoint.

    Returns:
        The licence; None if there is no README, or no licence in it that can be parsed.
    """
    try:
        path = companion_path(folder, README)
        text = "" if path is None else read_bytes(path).decode("utf-8", "replace")
    except CompanionError:
        return None  # only the licence is read from a README, so a broken one is no error
    front = _FRONT.match(text)
    return None if front is None else _parse(front[1])


def _parse(front: str) -> LicenseEntry | None:
    import yaml

    # Only these keys are parsed: the rest may be long, or broken.
    block = "\n".join(found[0] for found in _KEYS.finditer(front.replace("\r\n", "\n")))
    if len(block) > _LONGEST_BLOCK:
        return None
    try:
        stated = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError):  # an impossible date is a ValueError
        return None
    if not isinstance(stated, dict):
        return None
    known: object = stated.get("license")
    if isinstance(known, list) and len(known) == 1:  # a list of one is an older form
        (known,) = known
    if not _is_word(known):
        return None
    return LicenseEntry(
        license=known, license_name=_word(stated, "name"), license_link=_word(stated, "link")
    )


def _word(stated: dict[Any, Any], what: str) -> str | None:
    found: object = stated.get(f"license_{what}")
    return found if _is_word(found) else None


def _is_word(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable()
