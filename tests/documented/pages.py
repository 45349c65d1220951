"""What the documentation shows: commands, Python, and files to write.

A `console` block is commands, one a line. A `python` block is a program. A block whose first line
is a comment `# file: NAME` is a file. Code within a sentence or a table is a command if it begins
with a program's name and has arguments.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "examples").rglob("README.md")),
    ROOT / "diffxfer" / "README.md",
    ROOT / "tests" / "README.md",
)
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FILE = re.compile(r"# file: (\S+)\n")
_PROGRAM = re.compile(r"(diffxfer|python3?|pip|pipx|pytest|hf|accelerate) ")
_MENTION = re.compile(r"diffxfer [a-z]+|pip install")
"""The name of a command without arguments."""


@dataclass(frozen=True)
class Shown:
    """Something that a page shows.

    Attributes:
        page: which, relative to the checkout.
        kind: `command`, `python` or `file`.
        text: the command in one line, the program, or the content of the file.
        name: of the file.
    """

    page: str
    kind: str
    text: str
    name: str = ""


def shown_in(path: Path) -> list[Shown]:
    """What a page or a script's docstring shows, from top to bottom.

    Args:
        path: of Markdown or Python.
    """
    page = str(path.relative_to(ROOT))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        found = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
        return [Shown(page, "command", line) for line in found]
    return list(_of_markdown(page, text))


def _of_markdown(page: str, text: str) -> Iterator[Shown]:
    end = 0
    for block in _BLOCK.finditer(text):
        yield from _of_prose(page, text[end : block.start()])
        yield from _of_block(page, *block.groups())
        end = block.end()
    yield from _of_prose(page, text[end:])


def _of_block(page: str, kind: str, body: str) -> Iterator[Shown]:
    file = _FILE.match(body)
    if file:
        yield Shown(page, "file", body, file.group(1))
    elif kind == "python":
        yield Shown(page, "python", body)
    elif kind == "console":
        for line in body.replace("\\\n", " ").splitlines():
            yield Shown(page, "command", " ".join(line.split()))


def _of_prose(page: str, text: str) -> Iterator[Shown]:
    for code in _CODE.findall(text):
        # A bar within a table stands behind a backslash, and means a bar.
        command = code.replace(r"\|", "|")
        if _PROGRAM.match(command) and not _MENTION.fullmatch(command):
            yield Shown(page, "command", command)


def everything() -> Iterator[tuple[Path, list[Shown]]]:
    """Every page and script, with what it shows."""
    for path in (*PAGES, *SCRIPTS):
        yield path, shown_in(path)
