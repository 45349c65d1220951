"""A report goes into a folder of its own, and never among the files that it is about."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from diffxfer.errors import OutputError, OutputExistsError
from diffxfer.pages.page import Page
from diffxfer.pages.report_folder import report_folder, write_report

if TYPE_CHECKING:
    from pathlib import Path


def test_a_new_folder_gets_the_page_and_its_data(tmp_path: Path) -> None:
    folder = report_folder(tmp_path / "a" / "b", [tmp_path / "model"])
    assert not folder.exists()  # a failure before the report leaves nothing behind
    write_report(folder, Page("title"), {"name": "é", "ratio": 0.5})
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert json.loads((folder / "report.json").read_text("utf-8")) == {"name": "é", "ratio": 0.5}
    assert "<h1>title</h1>" in (folder / "report.html").read_text("utf-8")


def test_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    for title in ("first", "second"):
        write_report(report_folder(tmp_path / "r", []), Page(title), {})
    assert "<h1>second</h1>" in (tmp_path / "r" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("model", "is the input"),
        ("model/report", "is inside the input"),
        ("other", "has other files, such as notes.txt"),
        ("other/notes.txt", "is not a folder"),
        ("other/notes.txt/report", "is not a folder"),
    ],
)
def test_other_folders_are_refused(out: str, said: str, tmp_path: Path) -> None:
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=said):
        report_folder(tmp_path / out, [tmp_path / "model"])
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_a_link_to_an_input_is_that_input(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(OutputExistsError, match="is the input"):
        report_folder(tmp_path / "link", [tmp_path / "model"])


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r" / "report.json").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"report\.json cannot be written"):
        write_report(tmp_path / "r", Page("p"), {})
