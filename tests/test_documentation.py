"""Links, paths, options and remedies that the pages name exist.

`python -m tests.documented` runs the commands in the pages; these tests check that it finds them.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import pytest

from tests import tiny
from tests.cli.test_commands import EVERY, options_in
from tests.documented.exceptions import NOT_RUN, argv_to_run, reason_not_to_run
from tests.documented.pages import PAGES, ROOT, SCRIPTS, everything, shown_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = ROOT / "diffxfer"
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
PATH = re.compile(r"(?:examples|tests|diffxfer|cli|diffs|streaming|recycling|checkpoints)/[\w./]+")
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def slug(heading: str) -> str:
    """The anchor of a Markdown heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return kept.strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(line) for line in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)}


@PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.is_file(), link
        assert not anchor or anchor in anchors(file), link


def test_the_front_page_works_on_a_package_index() -> None:
    # An index shows this page alone: relative links would lead nowhere, anchors within it are kept.
    text = (ROOT / "README.md").read_text("utf-8")
    assert all(link.startswith(("https://", "#")) for link in LINK.findall(text))
    assert len(text.splitlines()) <= 300


@PAGE
def test_paths_are_there(page: Path) -> None:
    for path in PATH.findall(" ".join(CODE.findall(page.read_text("utf-8")))):
        if re.search("[A-Z]{4}", path.replace("README", "")):
            continue  # NAME and the like stand for what is to be written
        found = [ROOT / path, PACKAGE / path, page.parent / path]
        assert any(each.exists() for each in found), path


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The options of all commands."""
    return {
        option
        for command in ("", *EVERY)
        for option in options_in(tiny.run(*command.split(), "--help").out)
    }


@PAGE
def test_options_that_stand_alone_are_those_of_a_command(page: Path, known: set[str]) -> None:
    scripts = " ".join(script.read_text("utf-8") for script in SCRIPTS)
    text = page.read_text("utf-8")
    for code in (code for code in CODE.findall(text) if code.startswith("--")):
        for option in OPTION.findall(code):
            assert option in known or f'"{option}"' in scripts or option == "--help", code


def texts(path: Path) -> Iterator[str]:
    """The strings of a module except docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    comments = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in comments
        ):
            yield node.value


def test_options_that_messages_name_are_those_of_a_command(known: set[str]) -> None:
    others = {
        "--help",
        "--local-dir",
        "--revision",
        "--safe_serialization",
        "--multi_gpu",
        "--num-cpus",
        "--address",
    }  # of other programs
    for path in sorted(PACKAGE.rglob("*.py")):
        for text in (text for text in texts(path) if "var(--" not in text):  # no style sheets
            strange = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)) - known - others
            assert not strange, (path.name, text)


def test_commands_that_messages_name_are_commands() -> None:
    shown = re.compile(r"diffxfer ([a-z]+) (?:[A-Z]{3}|--)")
    named = {
        verb
        for path in sorted(PACKAGE.rglob("*.py"))
        for text in texts(path)
        for verb in shown.findall(text)
    }
    assert {"apply", "extract", "eval"} <= named <= {*EVERY}


class TestWhatIsRun:
    def test_commands_are_found_in_blocks_tables_and_docstrings(self) -> None:
        found = {(shown.page, shown.text) for _, all_shown in everything() for shown in all_shown}
        block = "diffxfer extract llama-3.0-sft llama-3.0 -o sft-diff"
        assert ("README.md", block) in found
        assert ("README.md", "diffxfer transfer INSTRUCT BASE YOURS -o OUT") in found
        assert ("examples/graft_family.py", "python examples/graft_family.py") in found
        joined = [text for page, text in found if "gpu_memory_utilization" in text]
        assert joined, "a command of several lines is one"
        assert all(text.endswith("--output scores") for text in joined)

    @pytest.mark.parametrize("command", EVERY)
    def test_every_command_is_run_in_some_page(self, command: str) -> None:
        run = [
            shown.text
            for _, all_shown in everything()
            for shown in all_shown
            if shown.text.startswith(f"diffxfer {command} ") and not reason_not_to_run(shown.text)
        ]
        assert run or command == "demo"

    def test_every_exception_is_of_a_command_that_is_shown(self) -> None:
        commands = [shown.text for _, all_shown in everything() for shown in all_shown]
        for pattern in NOT_RUN:
            assert any(re.fullmatch(pattern, command) for command in commands), pattern

    def test_what_is_run_instead_is_smaller_and_no_other_command(self) -> None:
        words = ["diffxfer", "tune", "MODEL", "--data", "FILE", "-o", "OUT", "--steps", "N"]
        found = argv_to_run(words)
        assert found[: len(words)] == [*words[:4], "train.jsonl", *words[5:8], "1"]
        assert found[len(words) : len(words) + 2] == ["--steps", "1"]

    def test_a_file_and_a_program_are_found(self) -> None:
        chain = shown_in(ROOT / "examples" / "chain" / "README.md")
        assert [shown.name for shown in chain if shown.kind == "file"] == ["chain.yaml"]
        library = shown_in(ROOT / "examples" / "library" / "README.md")
        assert [shown.kind for shown in library] == ["python", "python"]
