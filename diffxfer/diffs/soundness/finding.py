"""A contradiction between the files of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

Severity: TypeAlias = Literal["error", "warning"]

_LISTED = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """A contradiction between the files of a model.

    Attributes:
        severity: ``"error"`` if the model fails because of it, otherwise ``"warning"``.
        file: the name of the file to correct.
        value: the value in it, such as ``"eos_token_id 151643 ('<|endoftext|>')"``.
        problem: what contradicts the value; value and problem form a sentence.
        remedy: what the user can do.
    """

    severity: Severity
    file: str
    value: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        said = f"{self.value} {self.problem}".strip()
        return f"{self.file}: {said}; {self.remedy}"


def name_tokens(ids: Sequence[int], tokens: Sequence[str | None]) -> str:
    """The first few tokens with their ids, and how many more there are."""
    named = ", ".join(f"{str(tokens[i])[:40]!r} (id {i})" for i in ids[:_LISTED])
    return f"{named} and {len(ids) - _LISTED} more" if len(ids) > _LISTED else named
