"""Errors as JSON values, for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffxfer.errors import DamageError, DiffxferError, MatchError, RelatednessError

if TYPE_CHECKING:
    from pathlib import Path


def error_as_json(exc: DiffxferError, log: Path | None = None) -> dict[str, Any]:
    """An error as JSON values, with all its culprits.

    Args:
        exc: the error.
        log: the log of what libraries printed before it, if there is one.
    """
    from dataclasses import asdict

    found: dict[str, Any] = {
        "type": type(exc).__name__,
        "where": exc.where,
        "problem": exc.problem,
        "remedy": exc.remedy,
    }
    if isinstance(exc, MatchError):
        found["culprits"] = [asdict(group) for group in exc.groups]
    if isinstance(exc, DamageError):
        found["damage"] = [asdict(damage) for damage in exc.damage]
    if isinstance(exc, RelatednessError):
        found |= {"roles": exc.roles, "cosine": exc.cosine, "samples": exc.samples}
    if log is not None:
        found["log"] = str(log)
    return found
