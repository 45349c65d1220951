"""Reading untrusted JSON: limits on depth and numbers, and no invalid characters."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from pathlib import Path

# No id, size or length has so many digits, and int() takes quadratic time.
_MAX_DIGITS = 400
_MAX_DEPTH = 64
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS: dict[type, str] = {list: "array", str: "string", bool: "boolean", type(None): "null"}


def parse_json(raw: bytes, where: Path) -> Any:
    """Parse the document in ``raw``, read from ``where``."""
    try:
        text = raw.decode("utf-8")
        document = json.loads(text, parse_int=_parse_int)
        _check_depth(document)
        if _SURROGATE.search(text):
            # A lone surrogate is not a character: writing or printing it would fail.
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as exc:
        raise _not_json(where, f" (line {exc.lineno})", exc.msg) from exc
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise _not_json(where, f" (line {line})", "not UTF-8") from exc
    except UnicodeEncodeError as exc:
        raise _not_json(where, "", "an unpaired surrogate in a string") from exc
    except RecursionError as exc:
        raise _not_json(where, "", "nested too deeply") from exc
    except ValueError as exc:
        raise _not_json(where, "", str(exc)) from exc
    return document


def _parse_int(literal: str) -> int:
    if len(literal) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(literal)} digits")
    return int(literal)


def _check_depth(document: Any) -> None:
    """Limit the depth, because code that walks a document may recurse, up to Python's limit."""
    level = [document]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def _not_json(where: Path, place: str, reason: str) -> CompanionError:
    return CompanionError(
        where, f"is not JSON{place}: {reason}", "download or save the checkpoint again"
    )


def parse_object(raw: bytes, where: Path) -> dict[str, Any]:
    """Parse the object in ``raw``, read from ``where``; see `companions.read_object`.

    Raises:
        CompanionError: it is not JSON, or not an object.
    """
    document = parse_json(raw, where)
    if not isinstance(document, dict):
        raise CompanionError(
            where,
            f"is a JSON {_KINDS.get(type(document), 'number')}, expected an object",
            "download or save the checkpoint again",
        )
    return document
