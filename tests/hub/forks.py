"""Running the command line many times, each in a separate process with its own environment.

huggingface_hub reads `HF_ENDPOINT`, `HF_HOME` and the like once, when it is imported, so a command
that meets a Hub needs a new process; and importing all takes a while. So one process imports what
is slow, but nothing of the Hub, and forks for every command.

As a script it is that process: it reads one JSON object a line, runs the command and answers one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_OURS = ("HF_", "HUGGING", "XDG_CACHE_HOME", "TRANSFORMERS_", "FORCE_COLOR", "DIFFXFER_")
"""Variables of the environment of the tests, which commands do not inherit."""


class Forks:
    """The process that forks.

    Args:
        program: the module that is that process; it ends in `serve`.
        env: what it has from the beginning, for what it imports.
    """

    def __init__(
        self, program: str = "tests.hub.forks", env: Mapping[str, str] | None = None
    ) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(_OURS)
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**environment, "OMP_NUM_THREADS": "1", **(env or {})},
            text=True,
        )

    def run(
        self,
        *argv: str | Path,
        cwd: Path,
        env: Mapping[str, str],
        stop: tuple[Path, str, int] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end.

        Args:
            argv: what follows ``diffxfer``.
            cwd: where.
            env: more variables.
            stop: a folder, a pattern and a signal, which the command gets once such a path exists.
        """
        order: dict[str, Any] = {
            "argv": [str(word) for word in argv],
            "cwd": str(cwd),
            "env": dict(env),
        }
        if stop is not None:
            order["stop"] = [str(stop[0]), *stop[1:]]
        return self._send(order)

    def run_code(self, code: str, *argv: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a program, as ``python -c`` does."""
        words = [str(word) for word in argv]
        return self._send({"argv": words, "code": code, "cwd": str(cwd), "env": {}})

    def _send(self, order: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        done = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(order["argv"], done["status"], done["out"], done["err"])

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(60)  # it may still import, which takes long on a busy machine


def serve() -> None:
    """Fork for every line of stdin, until it ends."""
    gc.freeze()  # a command's garbage is not among what was imported here
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                _be(order, out.fileno(), err.fileno())
            _, state = os.waitpid(child, 0)
            status = os.waitstatus_to_exitcode(state)
            texts = [_text(file) for file in (out, err)]
        print(json.dumps({"status": status, "out": texts[0], "err": texts[1]}), flush=True)


def _text(file: Any) -> str:
    file.seek(0)
    data: bytes = file.read()
    return data.decode()


def _stop(folder: str, pattern: str, number: int) -> None:
    while not any(Path(folder).glob(pattern)):
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def _be(order: dict[str, Any], out: int, err: int) -> None:
    """Become the command."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(order["cwd"])
    os.environ.update(order["env"])
    tempfile.tempdir = None  # TMPDIR may be among them
    sys.argv = ["diffxfer", *order["argv"]]
    if "stop" in order:
        threading.Thread(target=_stop, args=order["stop"], daemon=True).start()
    status: object = 1
    with contextlib.suppress(BaseException):
        try:
            if "code" in order:
                exec(order["code"], {"__name__": "__main__"})
            else:
                from diffxfer.cli.main import main

                main()
            status = 0
        except SystemExit as exc:
            status = exc.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
    if "TEST_MODULES" in os.environ:
        Path(os.environ["TEST_MODULES"]).write_text(json.dumps(sorted(sys.modules)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    # Imported once, here; nothing may import huggingface_hub before the environment is set, but
    # what it imports may be.
    import diffxfer.cli.main
    import diffxfer.diffs.extraction.extract
    import diffxfer.diffs.grafting.graft
    import diffxfer.streaming.engine  # noqa: F401 and llvmlite

    for imported in ("diffxfer.cli.app", "filelock", "httpx2", "ssl", "tqdm", "yaml"):
        import_module(imported)

    assert "huggingface_hub" not in sys.modules
    serve()
