"""Run what the documentation shows, each page in a separate folder, and print what fails.

$ python -m tests.documented
$ python -m tests.documented examples/hub/README.md --reasons
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING

from tests.documented.exceptions import SMALLER_FILES, argv_to_run, reason_not_to_run
from tests.documented.pages import ROOT, everything
from tests.documented.stock import NAMES, make_stock, publish_stock
from tests.hub import writing
from tests.hub.forks import Forks
from tests.hub.server import Hub

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.documented.pages import Shown

TOKEN = "hf_documented"
PRELUDE = """
import functools, diffxfer
diffxfer.evaluate = functools.partial(
    diffxfer.evaluate, include_path="tasks", limit=2, device="cpu"
)
"""
"""Before a program: what `eval` gets on the command line."""


@dataclass
class Reader:
    """A user who types what a page shows.

    Attributes:
        home: the folder in which commands run.
        env: variables besides those of this process.
        forks: what runs `diffxfer`.
        variables: assignments that the page made, as the shell reads them.
    """

    home: Path
    env: dict[str, str]
    forks: Forks
    variables: str = ""

    def do(self, shown: Shown) -> str | None:
        """Run a shown command, program or file; returns the failure, if any.

        Args:
            shown: a command, a program or a file.
        """
        if shown.kind == "file":
            self._write(shown)
            return None
        if shown.kind == "python":
            for out in re.findall(r'(?:extract_diff|transfer)\(.*"([^"]+)"[^"]*\)\n', shown.text):
                self._remove(out)
            return self._failure(self._start([sys.executable, "-c", PRELUDE + shown.text]))
        if "=" in shown.text.split()[0]:
            self.variables += shown.text + "\n"
            return None
        words = argv_to_run(self._words(shown.text))
        self._make_room(words)
        if words[0] == "diffxfer":
            return self._failure(self.forks.run(*words[1:], cwd=self.home, env=self.env))
        if ">" in words:
            return self._failure(self._start(["bash", "-euc", shown.text]))
        return self._failure(self._start(words))

    def _words(self, command: str) -> list[str]:
        """The words of a command, as the shell reads them."""
        # Parts in brackets are optional: they are given.
        script = f"set -f\n{self.variables}printf '%s\\0' {_quoted_redirection(command)}"
        done = self._start(["bash", "-euc", script])
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.split("\0")[:-1]

    def _start(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **self.env, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            argv, cwd=self.home, env=env, check=False, capture_output=True, text=True
        )

    @staticmethod
    def _failure(done: subprocess.CompletedProcess[str]) -> str | None:
        if done.returncode == 0 and "Traceback" not in done.stderr:
            return None
        return f"exit status {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"

    def _make_room(self, words: Sequence[str]) -> None:
        """Remove the output of an earlier command if this one writes to the same place."""
        for option in {"-o", "--output"} & set(words):
            if words[1] != "iterate":
                self._remove(words[words.index(option) + 1])

    def _remove(self, name: str) -> None:
        path = self.home / name
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)

    def _write(self, shown: Shown) -> None:
        text = shown.text
        for part, smaller in SMALLER_FILES.items():
            text = text.replace(part, smaller)
        path = self.home / shown.name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")


def _quoted_redirection(command: str) -> str:
    return command.replace(" > ", " '>' ")


def furnish(home: Path, stock: Path) -> None:
    """Put every model and file that the documentation names into a folder.

    Args:
        home: a new one.
        stock: what was made.
    """
    home.mkdir()
    for name, found in NAMES.items():
        if found.endswith((".jsonl", ".yaml")):
            shutil.copy(stock / found, home / name)
        else:
            (home / name).symlink_to((stock / found).resolve())
    shutil.copytree(ROOT / "examples", home / "examples", ignore=shutil.ignore_patterns("__py*"))
    recipe = home / "examples" / "chain.yaml"
    text = recipe.read_text("utf-8")
    for part, smaller in SMALLER_FILES.items():
        text = text.replace(part, smaller)
    recipe.write_text(text)
    (home / "diffxfer").symlink_to(ROOT / "diffxfer")


def main(pages: Sequence[str], *, reasons: bool) -> int:
    """Run everything, two pages at a time, and print what fails; returns the number of failures.

    Args:
        pages: those to run, relative to the checkout; all if empty.
        reasons: print also how long each takes, and what is not run and why.
    """
    started, counts = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch, Hub(Path(scratch, "hub")) as hub:
        stock = make_stock(Path(scratch, "stock"))
        publish_stock(hub, stock)
        writing.let_write(hub, TOKEN, "me")
        env = environment(hub, Path(scratch))
        wanted: Queue[tuple[Path, list[Shown]]] = Queue()
        for path, found in everything():
            if not pages or str(path.relative_to(ROOT)) in pages:
                wanted.put((path, found))

        def work() -> None:
            forks = Forks("tests.documented.warm", env)
            with suppress(Empty):
                while True:
                    path, found = wanted.get_nowait()
                    home = Path(scratch, str(path.relative_to(ROOT)).replace("/", "-"))
                    furnish(home, stock)
                    reader = Reader(home, env, forks)
                    for shown in sorted(found, key=lambda each: each.kind != "file"):
                        _run_one(reader, shown, counts, reasons=reasons)
                    shutil.rmtree(home)
            forks.close()

        with ThreadPoolExecutor(2) as workers:
            for done in [workers.submit(work) for _ in range(2)]:
                done.result()
    print(f"{dict(counts)}, {time.monotonic() - started:.0f} s")
    return counts["failed"]


def environment(hub: Hub, scratch: Path) -> dict[str, str]:
    """The variables of every command.

    Args:
        hub: the tests' own.
        scratch: where its cache may be.
    """
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(scratch / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def _run_one(reader: Reader, shown: Shown, counts: Counter[str], *, reasons: bool) -> None:
    reason = reason_not_to_run(shown.text)
    line = f"{shown.page}: {shown.text.strip().splitlines()[0]}"
    if reason is not None:
        counts["not run"] += 1
        if reasons:
            print(f"not run: {line}\n         {reason}")
        return
    began = time.monotonic()
    failure = reader.do(shown)
    if reasons:
        print(f"{time.monotonic() - began:5.1f} s  {line}", flush=True)
    counts["run"] += 1
    if failure is not None:
        counts["failed"] += 1
        print(f"failed: {line}\n{failure}", flush=True)


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if word != "--reasons"]
    sys.exit(1 if main(arguments, reasons="--reasons" in sys.argv) else 0)
