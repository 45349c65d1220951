"""Every remedy that names an option or a command: both exist, and following it helps.

`tests/remedies.py` has the errors that are made on purpose, and how their remedies are followed.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

from diffxfer.cli.app import app
from tests import remedies, tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.remedies import Case
    from tests.tiny import World

PACKAGE = Path(__file__).parents[1] / "diffxfer"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z_-]*[a-z]")
COMMAND = re.compile(r"\bdiffxfer ([a-z]+)((?: (?:[A-Z]+\b|'[^']*'|--?[a-z-]+|[\d.]+|\{[^}]*\}))*)")

OTHER_TOOLS = {
    *("--revision", "--local-dir"),  # hf download
    *("--multi_gpu",),  # accelerate launch
    *("--num-cpus", "--address"),  # ray start, ray status
    *("--safe_serialization",),  # DeepSpeed's zero_to_fp32.py
}
NO_COMMANDS = {"is", "reads", "with", "wrote", "made", "never", "did", "does", "makes", "trl"}
"""Words that follow the name in a sentence."""

STREAMED = ("apply", "extract", "transfer")
GRAFTED = ("apply", "transfer")
MEASURED = (*STREAMED, "probe")
RAISED_BY = {
    "cluster": (*STREAMED, "inspect", "verify"),
    "checkpoints/hub/download.py": MEASURED,
    "checkpoints/hub/refusals.py": ("push",),
    "checkpoints/output_place.py": (*STREAMED, "tune"),
    "checkpoints/partial.py": (*STREAMED, "tune"),
    "checkpoints/writer.py": (*STREAMED, "tune"),
    "diffs/artifact/card.py": ("apply",),
    "diffs/companions": GRAFTED,
    "diffs/extraction": ("extract",),
    "diffs/grafting": GRAFTED,
    "diffs/jobs": STREAMED,
    "diffs/lora": ("extract",),
    "diffs/grafting/move_adapter.py": ("apply",),
    "diffs/grafting/move_checks.py": ("apply",),
    "diffs/matching/match.py": ("extract",),
    "diffs/matching": MEASURED,
    "diffs/matching/rename.py": (*MEASURED, "verify"),
    "diffs/matching/ties.py": (*GRAFTED, "probe"),
    "diffs/relations": STREAMED,
    "diffs/verification": ("verify",),
    "diffs/vocab": MEASURED,
    "evaluation": ("eval",),
    "probing": ("probe",),
    "publishing": ("push",),
    "recycling": ("tune",),
    "recycling/chain_state.py": ("iterate",),
    "recycling/chain_inputs.py": ("iterate",),
    "recycling/chain_checks.py": STREAMED,
    "recycling/chain_steps.py": ("iterate",),
    "recycling/iterate.py": ("iterate",),
    "streaming": STREAMED,
    "streaming/run.py": (*MEASURED, "inspect", "verify"),
}
"""The commands that print the errors of a module, by the longest prefix of its path."""
ONLY_IN = {
    ("cluster/ray_cluster.py", "--device"): STREAMED,
    ("diffs/lora/options.py", "--as"): ("apply", "extract"),
    ("diffs/matching/selection.py", "--alpha"): GRAFTED,
    ("diffs/matching/selection.py", "--alpha-for"): GRAFTED,
    ("evaluation/head_labels.py", "--added"): ("extract",),
    ("evaluation/score_rows.py", "--added"): ("apply",),
    ("probing/measure_models.py", "--dtype"): ("eval",),
    ("streaming/finite.py", "--alpha"): GRAFTED,
    ("streaming/run.py", "--device"): STREAMED,
    ("streaming/finite.py", "--out-dtype"): GRAFTED,
    ("streaming/finite.py", "--diff-dtype"): ("extract",),
    ("streaming/task_values.py", "--alpha"): GRAFTED,
}
"""Options that a module names only in the errors of these commands."""


@cache
def options() -> dict[str, set[str]]:
    """The options of each command."""
    group = typer.main.get_command(app)
    return {
        name: {word for param in command.params for word in (*param.opts, *param.secondary_opts)}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def texts(path: Path) -> Iterator[str]:
    """The strings of a module that are not docstrings; a placeholder stands as its expression."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }  # docstrings, also those below a constant
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node)} - {id(node)}
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value)
                if isinstance(part, ast.Constant)
                else "{" + ast.unparse(part.value) + "}"  # type: ignore[attr-defined]
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def messages() -> tuple[tuple[str, str], ...]:
    """Every text of the library, each after its module."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if not module.startswith(("cli/", "family/", "pages/")):  # pages have CSS variables
            found += [(module, text) for text in texts(path)]
    return tuple(found)


def raised_by(module: str) -> tuple[str, ...]:
    prefixes = [prefix for prefix in RAISED_BY if module.startswith(prefix)]
    assert prefixes, f"{module} names an option: say in RAISED_BY which commands print its errors"
    return RAISED_BY[max(prefixes, key=len)]


NAMED = sorted(
    {
        (module, option)
        for module, text in messages()
        for option in OPTION.findall(COMMAND.sub("", text))
    }
)


def test_options_are_found_in_the_messages() -> None:
    assert len(NAMED) > 60
    assert ("diffs/matching/refusal.py", "--allow-missing") in NAMED


@pytest.mark.parametrize(("module", "option"), NAMED)
def test_an_option_that_a_message_names_exists(module: str, option: str) -> None:
    if option in OTHER_TOOLS:
        return
    commands = ONLY_IN.get((module, option), raised_by(module))
    lacking = [name for name in commands if option not in options()[name]]
    assert not lacking, f"{module} names {option}, which {lacking} lacks"


def test_the_tables_have_no_row_too_many() -> None:
    named = {module for module, _ in NAMED}
    assert all(any(module.startswith(row) for module in named) for row in RAISED_BY)
    assert set(ONLY_IN) <= set(NAMED)
    assert {option for _, option in NAMED} >= OTHER_TOOLS


def test_a_command_that_a_message_names_exists_and_has_the_options_beside_it() -> None:
    known = options()
    found = [(m, *match) for m, text in messages() for match in COMMAND.findall(text)]
    named = {command for _, command, _ in found} - NO_COMMANDS
    assert named >= {"extract", "apply", "eval"}
    assert named <= set(known), named - set(known)
    for module, command, words in found:
        beside = {word for word in words.split() if word.startswith("-")}
        assert command in NO_COMMANDS or beside <= known[command], (module, command, words)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A sound family with its diff vector; cases break copies of it."""
    return tiny.make_world(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("case", remedies.CASES, ids=lambda case: case.name)
def test_following_the_remedy_helps(case: Case, family: World, tmp_path: Path) -> None:
    world = family.copy(tmp_path)
    argv = case.begin(world)
    with case.during():
        failed = tiny.run(*argv)
    assert failed.status in (1, 2), failed
    assert failed.err.startswith("error: "), failed
    said = re.search(case.remedy, failed.err)
    assert said is not None, failed.err
    argv = case.follow(world, argv, said)
    helped = tiny.run(*argv)
    if case.gets_past:
        assert re.search(case.remedy, helped.err) is None, helped
        assert helped.status in (1, 2)
    else:
        assert helped.status == 0, helped
