"""Errors as values: all that was found, for a program."""

from __future__ import annotations

from typing import Any

from diffxfer.errors import DamageError, DiffxferError, MatchError, RelatednessError


def error_as_json(exc: DiffxferError) -> dict[str, Any]:
    """An error as values that JSON has, with every culprit of it.

    Args:
        exc: the error.
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
    return found
