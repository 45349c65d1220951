"""The layout of `--help`: options in groups, plain text at any width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from collections.abc import Iterable

WHAT, HOW, WHERE = "What", "How strongly", "Where"
TRAINING, DISTILLATION = "Training", "Distillation"
TASKS, PROMPTS = "Tasks", "Prompts"
SAFETY, OUTPUT = "Safety", "Output"

_ARGUMENTS = "Arguments"
_ORDER = (_ARGUMENTS, WHAT, HOW, TASKS, PROMPTS, TRAINING, DISTILLATION, WHERE, SAFETY, OUTPUT)

EITHER, PATH = "PATH|ID", "PATH"
"""Placeholders: a model in a folder or on the Hub; a local path."""

_KINDS = {"RECIPE": PATH} | dict.fromkeys((EITHER, PATH, "org/name"), "")
"""The placeholder of arguments that do not take a model, by name."""

_COLUMN = 30
"""The most width of the first column; a wider entry gets a separate line."""


class GroupedCommand(TyperCommand):
    """A command whose options are shown in the groups that their `rich_help_panel` names.

    Typer itself groups them only in boxes, which need a terminal with box-drawing characters.
    """

    def grouped(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """Every argument and option with its help text, by group; empty groups are left out.

        Args:
            ctx: click's context.
        """
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in _ORDER}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                name = str(param.metavar)
                record = f"{name} {_KINDS.get(name, EITHER)}".rstrip(), record[1]
            # --help has no group.
            groups[getattr(param, "rich_help_panel", None) or _group(param)].append(record)
        return {name: rows for name, rows in groups.items() if rows}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; an option whose placeholder is ``[a|b]`` is ``a`` without a value.

        Args:
            ctx: click's context.
            args: the arguments.
        """
        known = {
            option: placeholder[1:-1].split("|")
            for param in self.get_params(ctx)
            if (placeholder := str(param.metavar)).startswith("[")
            for option in param.opts
        }
        end = args.index("--") if "--" in args else len(args)
        given = [
            f"{arg}={known[arg][0]}" if arg in known and after not in known[arg] else arg
            for arg, after in zip(args[:end], (*args[1:end], ""), strict=False)
        ]
        return super().parse_args(ctx, [*given, *args[end:]])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the options, group by group.

        Args:
            ctx: click's context.
            formatter: click's formatter.
        """
        groups = self.grouped(ctx)
        width = min(_COLUMN, max(len(name) for rows in groups.values() for name, _ in rows))
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl(_aligned(rows, width))


def _group(param: Any) -> str:
    return _ARGUMENTS if param.param_type_name == "argument" else OUTPUT


def _aligned(rows: Iterable[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """The rows of a group, with the second column aligned across groups."""
    return [(name.ljust(width), text) for name, text in rows]
