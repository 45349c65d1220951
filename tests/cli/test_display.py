"""The bar, and the log that takes what libraries print."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from rich.cells import cell_len

from diffxfer.cli.bar import Bar, Pace
from diffxfer.cli.display import Display
from diffxfer.errors import CheckpointError, DiffxferError, EvaluationError, OptionError

if TYPE_CHECKING:
    from pathlib import Path


class TestTheBar:
    @pytest.mark.parametrize("columns", [30, 60, 80, 200])
    @pytest.mark.parametrize(
        "what", ["", "tuning", "round 2/3, alpha: target + 0.8·Δ (2/3)", "名" * 99]
    )
    @pytest.mark.parametrize("unit", ["steps", "requests", "bytes"])
    def test_fits_its_terminal(
        self, columns: int, what: str, unit: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        bar = Bar(StringIO())
        bar.show(what, 0, 12_345, unit)
        bar.show(what, 1_234, 12_345, unit, "loss 1.2345" if unit == "steps" else "")
        shown = lines(bar)
        bar.stop()
        assert len(shown) == 1
        if columns >= 80:
            assert cell_len(shown[0].rstrip()) < columns - 2  # and ^C, which a terminal echoes
            assert ("1,234/12,345" in shown[0]) is (unit != "bytes")

    def test_says_what_it_counts_where_there_is_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        bar = Bar(StringIO())
        bar.show("scoring: target (1/3)", 231, 1024, "requests")
        [line] = lines(bar)
        assert line.startswith("scoring: target (1/3) ")
        assert "231/1,024 requests" in line
        bar.begin("scoring: target + 0.8·Δ (2/3)")
        [line] = lines(bar)
        assert "1,024" not in line
        assert line.rstrip().endswith(" 0:00")
        bar.stop()

    def test_no_text_does_anything_to_the_terminal(self) -> None:
        bar = Bar(StringIO())
        bar.begin("\x1b[2J[bold]x")
        assert "\\x1b[2J[bold]x" in lines(bar)[0]
        bar.stop()


def lines(bar: Bar) -> list[str]:
    """What the bar looks like now, as text."""
    console = bar._progress.console
    options = console.options
    return [
        "".join(segment.text for segment in line)
        for renderable in bar._progress.get_renderables()
        for line in console.render_lines(renderable, options, pad=False)
    ]


class TestPace:
    def test_is_that_of_batches_from_when_nothing_was_done(self) -> None:
        pace = Pace()
        pace.note(0, 10.0)
        assert (pace.speed, pace.left_s(80)) == (None, None)
        pace.note(0, 20.0)  # until then, the questions were made
        for done in range(1, 9):
            pace.note(done, 24.0)
        assert (pace.speed, pace.left_s(80)) == (2.0, 36.0)
        pace.note(16, 32.0)
        assert pace.speed == 16 / 12

    def test_does_not_count_what_was_done_before(self) -> None:
        pace = Pace()
        pace.note(100, 0.0)
        pace.note(110, 5.0)
        assert (pace.speed, pace.left_s(120)) == (2.0, 5.0)


def chatter() -> None:
    """Print as libraries do: from Python and below it, on both streams."""
    print("python out")
    print("python err", file=sys.stderr)
    os.write(1, b"below out\n")
    subprocess.run(["/bin/sh", "-c", "echo child err >&2"], check=True)


CHATTER = ("python out", "python err", "below out", "child err")


class TestTheLog:
    @pytest.fixture(autouse=True)
    def home(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> pytest.CaptureFixture[str]:
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        monkeypatch.delenv("DIFFXFER_DEBUG", raising=False)
        for name in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "TQDM_MININTERVAL"):
            monkeypatch.setenv(name, "")  # so that it is put back
        return capfd

    def test_has_what_libraries_print_and_talk_is_seen(
        self, tmp_path: Path, home: pytest.CaptureFixture[str]
    ) -> None:
        display = Display(quiet=False)
        display.open_log()
        chatter()
        display.say("talk")
        display.settle_log(tmp_path / "diffxfer.log")
        chatter()
        assert display.close_log(None, keep=True) is None
        print("result")
        assert tuple(home.readouterr()) == ("result\n", "talk\n")
        log = (tmp_path / "diffxfer.log").read_text()
        assert log.startswith("$ diffxfer")
        assert [log.count(said) for said in CHATTER] == [2] * 4
        assert not list((tmp_path / "temporary").iterdir())

    @pytest.mark.parametrize("keep", [True, False])
    def test_that_says_nothing_is_not_left(self, keep: bool, tmp_path: Path) -> None:
        display = Display(quiet=False)
        display.open_log()
        display.settle_log(tmp_path / "diffxfer.log")
        assert display.close_log(None, keep=keep) is None
        assert [path.name for path in tmp_path.iterdir()] == ["temporary"]

    def test_of_an_earlier_run_stays(self, tmp_path: Path) -> None:
        log = tmp_path / "diffxfer.log"
        log.write_text("of yesterday\n")
        display = Display(quiet=True)
        display.open_log()
        display.settle_log(log)
        display.close_log(None, keep=True)
        assert log.read_text() == "of yesterday\n"

    def test_of_a_failure_is_named_and_says_where(self) -> None:
        display = Display(quiet=True)
        display.open_log()
        chatter()
        exc = EvaluationError("m", "failed", "mend it")
        exc.__cause__ = ValueError("below")
        log = display.close_log(exc, keep=False)
        assert log is not None
        assert str(exc) == f"m: failed; mend it; the output of its libraries is in {log}"
        text = log.read_text()
        assert all(said in text for said in (*CHATTER, "ValueError: below"))

    @pytest.mark.parametrize("kind", [OptionError, EvaluationError, CheckpointError])
    def test_is_not_named_where_an_error_says_all(
        self, kind: type[DiffxferError], tmp_path: Path
    ) -> None:
        display = Display(quiet=True)
        display.open_log()
        chatter()
        exc = kind("m", "is no model", "name one")
        assert display.close_log(exc, keep=True) is None
        assert str(exc) == "m: is no model; name one"
        assert not list((tmp_path / "temporary").iterdir())

    def test_is_written_through_no_link(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("secret")
        (tmp_path / "diffxfer.log").symlink_to(tmp_path / "key")
        display = Display(quiet=True)
        display.open_log()
        display.settle_log(tmp_path / "diffxfer.log")
        chatter()
        display.close_log(None, keep=True)
        assert (tmp_path / "key").read_text() == "secret"


def run(body: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run lines of a command that has a log, in a process of its own."""
    code = f"""
import faulthandler, os, sys
from diffxfer.cli.console import Console
with Console(json=False, quiet=False, logs=True) as console:
    print("chatter")
    {body}
"""
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


def test_a_bug_of_ours_has_its_traceback_on_the_terminal(tmp_path: Path) -> None:
    done = run("1 / 0", tmp_path)
    [log] = tmp_path.glob("*.log")
    assert done.stdout == ""
    said, *trace = done.stderr.splitlines()
    assert said == f"the output of its libraries is in {log}"
    assert trace[0].startswith("Traceback")
    assert trace[-1] == "ZeroDivisionError: division by zero"
    assert "chatter" in log.read_text()


def test_a_bar_that_a_failure_leaves_open_ends_in_the_log(tmp_path: Path) -> None:
    done = run("from tqdm import tqdm; bar = tqdm(total=7); bar.update(3); 1 / 0", tmp_path)
    [log] = tmp_path.glob("*.log")
    assert "3/7" in log.read_text()
    assert "3/7" not in done.stderr


def test_a_crash_in_c_is_told_of(tmp_path: Path) -> None:
    done = run("faulthandler._sigsegv()", tmp_path)
    assert done.returncode < 0
    assert done.stderr.startswith("Fatal Python error: Segmentation fault")
    assert "chatter" not in done.stderr


def test_what_is_printed_after_the_result_does_not_follow_it(tmp_path: Path) -> None:
    done = run("console._display.close_log(None, keep=False); print('result')", tmp_path)
    assert (done.stdout, done.stderr) == ("result\n", "")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_hides_no_failure(tmp_path: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))"
    done = run(f"sys.stdout.flush(); {full}; print('more'); 1 / 0", tmp_path)
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "OSError" not in done.stderr


def test_a_full_disk_leaves_no_empty_log_in_the_output(tmp_path: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    path = tmp_path / "out.txt"
    settle = f"from pathlib import Path; console._display.settle_log(Path({str(path)!r}))"
    done = run(f"{full}; {settle}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not path.exists()
