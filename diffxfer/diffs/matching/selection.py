"""The user's selection: which tensors take part, their scales, and which may be missing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_NO_GLOB = "give a regular expression: for the glob '*mlp*', give 'mlp'"
_TRY = "quote it for the shell, and correct it"


@dataclass(frozen=True, slots=True)
class Selection:
    """Options that select tensors by name. A pattern may match anywhere in a name.

    Attributes:
        alpha: the scale of Δ if no pattern of `alpha_for` matches.
        alpha_for: scales by pattern; the last match wins.
        include: patterns of names that take part; empty for all names.
        exclude: patterns of names that do not take part, even if `include` matches.
        allow_missing: patterns of names that a role may lack.
    """

    alpha: float = 1.0
    alpha_for: tuple[tuple[re.Pattern[str], float], ...] = ()
    include: tuple[re.Pattern[str], ...] = ()
    exclude: tuple[re.Pattern[str], ...] = ()
    allow_missing: tuple[re.Pattern[str], ...] = ()

    def selects(self, name: str) -> bool:
        """Whether a tensor takes part."""
        if self.include and not _any(self.include, name):
            return False
        return not (self.exclude and _any(self.exclude, name))

    def alpha_of(self, name: str) -> float:
        """The scale of a tensor's Δ."""
        for regex, alpha in reversed(self.alpha_for):
            if regex.search(name):
                return alpha
        return self.alpha

    def may_be_missing(self, name: str) -> bool:
        """Whether a role may lack a tensor."""
        return _any(self.allow_missing, name)

    def command(self) -> dict[str, list[str]]:
        """The patterns for the manifest."""
        return {
            "include": [regex.pattern for regex in self.include],
            "exclude": [regex.pattern for regex in self.exclude],
            "allow_missing": [regex.pattern for regex in self.allow_missing],
        }

    def refuse_unused(self, names: Collection[str]) -> None:
        """Refuse a pattern that matches nothing, since it is probably mistyped.

        Args:
            names: every name that a pattern may match.

        Raises:
            OptionError: if a pattern matches nothing; it names the pattern.
        """
        chosen = {
            "--alpha-for": [regex for regex, _ in self.alpha_for],
            "--include": self.include,
            "--exclude": self.exclude,
        }
        for option, patterns in chosen.items():
            for regex in patterns:
                if not any(map(regex.search, names)):
                    example = next(iter(sorted(names)), "")
                    problem = (
                        f"{regex.pattern!r} matches none of the {len(names)} tensors,"
                        f" which have names such as {example}"
                    )
                    raise OptionError(option, problem, _TRY)


def _any(patterns: Sequence[re.Pattern[str]], name: str) -> bool:
    return bool(patterns) and any(regex.search(name) for regex in patterns)


def make_selection(
    *,
    alpha: float = 1.0,
    alpha_for: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
) -> Selection:
    """Check the user's options and make a selection of them.

    Args:
        alpha: the scale of Δ.
        alpha_for: scales by pattern.
        include: patterns, or a single one.
        exclude: patterns, or a single one.
        allow_missing: patterns, or a single one.

    Returns:
        The selection.

    Raises:
        OptionError: for a scale that is not finite, or an invalid pattern.
    """
    scales = {"--alpha": alpha, **{f"--alpha-for {k!r}": v for k, v in (alpha_for or {}).items()}}
    for option, scale in scales.items():
        if not math.isfinite(scale):
            raise OptionError(option, f"{scale} is not a finite number", "give one such as 0.8")
    return Selection(
        float(alpha),
        tuple(
            (compile_pattern("--alpha-for", text), float(scale))
            for text, scale in (alpha_for or {}).items()
        ),
        _compile_all("--include", include),
        _compile_all("--exclude", exclude),
        _compile_all("--allow-missing", allow_missing),
    )


def _compile_all(option: str, texts: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    # A string is a sequence of letters; each letter would be a pattern that matches many names.
    return tuple(
        compile_pattern(option, text) for text in ([texts] if isinstance(texts, str) else texts)
    )


def compile_pattern(option: str, text: str) -> re.Pattern[str]:
    """Compile a user's regular expression.

    Args:
        option: the option that it was given to.
        text: the expression.

    Raises:
        OptionError: if it is not valid.
    """
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as exc:
        remedy = (
            "give a regular expression: for the glob '*mlp*', give 'mlp'"
            if text.startswith("*")
            else _TRY
        )
        raise OptionError(option, f"{text!r} is not a regular expression ({exc})", remedy) from exc
