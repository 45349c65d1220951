"""Training rows: every format, and the error for every kind of invalid row."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from diffxfer.errors import DataError
from diffxfer.recycling.training_data import is_local_file, read_rows

if TYPE_CHECKING:
    from pathlib import Path

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES},
    "completion": {"prompt": "hi", "completion": "ho"},
    "chat completion": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "text": {"text": "hi ho"},
}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_file(form: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = FORMS[form]
    rows = [{**row, "id": 1}, row, row]
    lines = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [read_rows(str(tmp_path / name)) for name in ("a.json", "a.parquet")]
    first = read_rows(lines)
    assert first.columns == {key: [value] * 3 for key, value in row.items()}
    assert len(first) == 3
    assert first.name == "a.jsonl"
    assert first.chat is (form not in ("completion", "text"))
    for other in found:
        assert (other.columns, other.digest) == (first.columns, first.digest)


def test_blank_lines_and_a_byte_order_mark_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"}')
    assert read_rows(str(tmp_path / "a.jsonl")).columns == {"text": ["a", "b"]}


def test_another_order_is_another_digest(tmp_path: Path) -> None:
    one = read_rows(write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}]))
    other = read_rows(write(tmp_path / "b.jsonl", [{"text": "b"}, {"text": "a"}]))
    assert one.digest != other.digest


GOOD = FORMS["completion"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows; give at least one"),
        (["hi"], "line 1 is 'hi', expected an object; give every row messages, or prompt"),
        ([{"question": "a"}], "line 1 has the keys 'question', which is not a supported format"),
        ([{"prompt": "a"}], "line 1 has only 'prompt', which is not a supported format"),
        ([{"prompt": "a", "answer": "b"}], "line 1 has the keys 'prompt', 'answer', which is not"),
        ([GOOD, {"prompt": "a"}], "line 2 lacks 'completion', which the first row has"),
        ([GOOD, {"text": "a"}], "line 2 lacks 'prompt', which the first row has"),
        ([GOOD, {"prompt": "a", "completion": ""}], "line 2 has an empty 'completion'"),
        ([{"text": 5}], "line 1 has 5 for 'text', expected text"),
        ([{"text": MESSAGES}], "for 'text', expected text"),
        ([{"messages": "hi"}], "line 1 has 'hi' for 'messages', expected a list of messages"),
        ([{"messages": []}], "line 1 has an empty 'messages'"),
        ([{"messages": ["hi"]}], "line 1 has 'hi' as message 1 of 'messages'"),
        ([{"messages": [{"role": "user"}]}], "line 1 has no text for 'content' in message 1"),
        (
            [{"messages": [*MESSAGES, {"role": "a", "content": "", "tool_calls": [1]}]}],
            "line 1 has 'tool_calls' in message 3 of 'messages', which is not supported",
        ),
        (
            [GOOD, FORMS["chat completion"]],
            "line 2 has messages for 'prompt', and line 1 has text",
        ),
        ([{"prompt": "a", "completion": MESSAGES}], "line 1 has text for one of prompt and"),
        ([{"text": "\ud800"}], "line 1 has an unpaired surrogate in 'text'"),
    ],
)
def test_a_row_that_cannot_be_trained_on(rows: list[Any], said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: is not JSON"),
        ("a.jsonl", b"\xff\xfe", "line 1: is not JSON"),
        ("a.json", b'{"text": "a"}', "expected a JSON array of rows"),
        ("a.parquet", b"PAR2", "is not a readable Parquet file"),
        ("a.csv", b"text\na\n", "has an unsupported file type"),
    ],
)
def test_a_file_that_cannot_be_read(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("absent.jsonl", "no such file"),
        ("./absent", "no such file"),
        ("/tmp", "is a folder"),
        ("a/b/c", "no such file"),
    ],
)
def test_a_file_that_is_not_there(data: str, said: str) -> None:
    assert is_local_file(data)
    with pytest.raises(DataError, match=said):
        read_rows(data)


def test_anything_else_is_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert not is_local_file("nobody/has-this-data-set@main")
    with pytest.raises(DataError, match="cannot be loaded as a dataset from the Hub") as caught:
        read_rows("nobody/has-this-data-set@main")
    assert "\n" not in str(caught.value)
