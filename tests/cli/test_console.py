"""Output on a terminal: progress, a summary, and names without control characters."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli.console import Console, as_known
from diffxfer.errors import DiffxferError, OutputError, printable
from tests import tiny
from tests.tiny import SHARD, Outcome, World

if TYPE_CHECKING:
    from pathlib import Path

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_a_terminal(*argv: str, columns: int = 100) -> tuple[int, str]:
    """Run the command line with both streams on a pseudo-terminal; its status and what it wrote."""
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": str(columns), "PATH": ""}
    command = [sys.executable, "-m", "diffxfer", *argv]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while data := os.read(ours, 1 << 16):
                written += data
        except OSError:  # EIO: the other end is closed
            pass
        os.close(ours)
        process.wait(timeout=60)
    return process.returncode, written.decode()


class TestATerminal:
    def test_sees_progress_and_then_a_summary(self, world: World) -> None:
        status, written = on_a_terminal(*world.argv("transfer"))
        assert status == 0
        assert "100%" in written
        assert re.search(r"\d+(\.\d)?/\d+(\.\d)? (bytes|kB|MB)", written)
        # The bar is erased, and what stays is the summary.
        last = ESCAPE.sub("", written.rpartition("\x1b[2K")[2])
        lines = last.replace("\r", "").splitlines()
        assert lines[0] == "tensors: 5 grafted"
        said = rf"wrote {re.escape(str(world.out))}: .+ in [\d.]+ s \(read and wrote .+/s\)"
        assert re.fullmatch(said, lines[-1])
        assert written.endswith("\n")

    def test_sees_what_a_diff_vector_does_not_give_back(self, world: World) -> None:
        weights = load_file(world.folders["base"] / SHARD)
        weights["model.norm.weight"][:] = 1e9
        save_file(weights, world.folders["base"] / SHARD)
        _, written = on_a_terminal(*world.argv("extract"))
        assert "does not give back 4 of finetuned's 76 elements" in written
        assert "--diff-dtype" in written

    def test_sees_only_errors_with_quiet(self, world: World) -> None:
        assert on_a_terminal(*world.argv("transfer", "--quiet")) == (0, "")
        status, written = on_a_terminal(*world.argv("transfer", "--quiet"))
        assert status == 1
        assert written.startswith("error: ")
        assert "\x1b" not in written

    def test_sees_an_error_on_a_line_of_its_own(self, world: World) -> None:
        weights = load_file(world.folders["base"] / SHARD)
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, world.folders["base"] / SHARD)
        status, written = on_a_terminal(*world.argv("transfer"))
        assert status == 1
        last = ESCAPE.sub("", written.rpartition("\x1b[2K")[2]).replace("\r", "")
        assert last.startswith("error: model.norm.weight: NaN in base at [3]")

    @pytest.mark.parametrize("columns", [60, 300])
    def test_sees_every_name_whole_in_a_plan(self, columns: int, world: World) -> None:
        status, written = on_a_terminal(*world.argv("transfer", "--dry-run"), columns=columns)
        assert status == 0
        assert written.count("grafted") == 4
        assert "…" not in written
        assert not world.out.parent.exists()


def test_a_pipe_gets_whole_lines(world: World) -> None:
    folder = world.folders["target"]
    name = "model." + "very_" * 60 + "long.weight"
    save_file({**load_file(folder / SHARD), name: torch.zeros(2)}, folder / SHARD)
    outcome = tiny.run(*world.argv("transfer", "--dry-run", "--allow-missing", "long"))
    assert re.search(rf"^copied +{name} +1 +2 +only the target has it *$", outcome.out, re.M)


NAMES = {
    "escape": "\x1b[2J\x1b]0;pwned\x07.weight",
    "newline": "a\nerror: all is well\r.weight",
    "rich markup": "[bold red]a[/bold red][link=http://x]b.weight",
    "unclosed markup": "[/nope]a[.weight",
    "bidi": "a\u202egnp.thgiew\u2066.weight",
    "emoji code": ":smile:.weight",
    "nothing": "",
    "spaces": " \t\u00a0\u2028.weight",
    "zero width": "a\u200b\ufeff.weight",
    "C1": "a\x9b2Jb.weight",
}


def harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def with_name(world: World, role: str, name: str) -> None:
    shard = world.folders[role] / SHARD
    save_file({**load_file(shard), name: torch.zeros(2)}, shard)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
class TestNamesThatMeanHarm:
    def test_in_an_error(self, name: str, world: World) -> None:
        with_name(world, "base", name)
        outcome = tiny.run(*world.argv("transfer"))
        assert outcome.status == 1
        assert outcome.err.startswith(f"error: 1 tensor does not fit: {printable(name)}")
        assert outcome.err.count("\n") == 1
        assert harmless(outcome.err)

    def test_in_a_table(self, name: str, world: World) -> None:
        with_name(world, "base", name)
        outcome = tiny.run(*world.argv("transfer", "--dry-run"))
        assert outcome.status == 1
        assert harmless(outcome.out + outcome.err)
        (row,) = [line for line in outcome.out.splitlines() if line.startswith("refused")]
        # Numbers in names are put together.
        assert re.sub(r"\d+", "*", printable(name)).strip() in re.sub(r"\d+", "*", row)

    def test_in_json(self, name: str, world: World) -> None:
        with_name(world, "base", name)
        outcome = tiny.run(*world.argv("transfer", "--json"))
        assert outcome.out.count("\n") == 1
        assert outcome.out.isascii()
        assert json.loads(outcome.out)["error"]["culprits"][0]["names"] == [name]

    def test_of_a_folder(self, name: str, tmp_path: Path) -> None:
        folder = tmp_path / f"x{name.replace('/', '')}"
        folder.mkdir()
        outcome = tiny.run("extract", folder, folder, "-o", tmp_path / "out")
        assert outcome.err.startswith(f"error: {printable(str(folder))}: has no config.json")
        assert outcome.err.count("\n") == 1
        assert harmless(outcome.err)


def test_names_that_mean_harm_on_a_terminal(world: World) -> None:
    for name in NAMES.values():
        with_name(world, "base", name)
    _, written = on_a_terminal(*world.argv("transfer", "--dry-run"), columns=200)
    shown = ESCAPE.sub("", written).replace("\r\n", "\n")
    assert harmless(shown)
    assert "[bold red]a[/bold red]" in shown
    assert ":smile:" in shown
    for code in ESCAPE.findall(written):
        assert re.fullmatch(r"\x1b\[[0-9;]*m", code), "more than a colour"


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    os.mkdir(folder)  # noqa: PTH102 - the name is what is tested
    outcome = tiny.run("extract", folder, folder, "-o", str(tmp_path / "out"))
    assert outcome.status == 1
    assert r"/\udcff\udcfe: has no config.json" in outcome.err
    assert json.loads(tiny.run("extract", folder, folder, "-o", "out", "--json").out)["error"]


def test_printable_keeps_what_is_harmless() -> None:
    assert printable("модель α − “x” 模型 😀 model.0") == "модель α − “x” 模型 😀 model.0"


def test_printable_escapes_the_rest() -> None:
    assert printable("\x1b\n\u202e\ud800\x7f") == r"\x1b\n\u202e\ud800\x7f"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (990, "990 bytes"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (5 * 10**9, "5.00 GB"),
        (1_234_567_890_123, "1.23 TB"),
    ],
)
def test_gigabytes(count: int, said: str) -> None:
    assert gigabytes(count) == said


class TestWhatIsKnown:
    def test_errors_of_ours(self) -> None:
        exc = OutputError("out", "is odd")
        assert as_known(exc) is exc

    def test_refusals_of_the_system(self) -> None:
        found = as_known(PermissionError(13, "Permission denied", "/elsewhere/model"))
        assert isinstance(found, DiffxferError)
        assert str(found).startswith("/elsewhere/model: Permission denied; ")

    @pytest.mark.parametrize("exc", [None, ValueError("ours"), BrokenPipeError(32, "Broken pipe")])
    def test_nothing_else(self, exc: BaseException | None) -> None:
        assert as_known(exc) is None


def test_a_bug_of_ours_is_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), Console(json=True, quiet=False):
        raise ZeroDivisionError
    assert capsys.readouterr().out == ""


def test_a_reader_that_goes_away_is_no_error(world: World) -> None:
    argv = [sys.executable, "-m", "diffxfer", *world.argv("transfer", "--dry-run")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_warnings_are_one_line_each_and_harmless(world: World) -> None:
    """A tokenizer in one role only is a reason for one."""
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    tokenizer["model"]["vocab"] = {f"t{i}": i for i in range(6)}  # type: ignore[index]
    tiny.write_json(world.folders["finetuned"] / "tokenizer.json", tokenizer)
    outcome = tiny.run(*world.argv("transfer"))
    assert (outcome.status, outcome.out) == (0, "")
    for line in outcome.err.splitlines():
        assert line.startswith("warning: ")
        assert "has no tokenizer" in line
    quiet = tiny.run(*world.argv("transfer", "--quiet", "--overwrite"))
    assert quiet == Outcome(0, "", outcome.err)
