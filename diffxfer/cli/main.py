"""Running the command line: the one place where errors become text.

What takes time to import is imported where `main` can tell of an interruption.
"""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Run the command line; errors of a known cause end in one line.

    Exit status: 0 if it worked, 1 if it could not be done, 2 if the command line makes no sense,
    130 after Ctrl-C, 143 after SIGTERM.
    """
    # Python looks for garbage after 700 new objects, and now and then through all of them: of
    # 60,000 tensors, that was a third of a command's time. There are next to no cycles to find.
    gc.set_threshold(100_000, 10, 10)
    try:
        _open_streams()
        _run()
    except KeyboardInterrupt as exc:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending already
        if "_DIFFXFER_COMPLETE" in os.environ:
            sys.exit(130)  # a shell asks what could be typed: nobody waits for a word
        from diffxfer.cli.console import print_interrupted

        sys.exit(print_interrupted(exc))
    finally:
        # Python ends by looking for garbage among all that torch is made of: half a second.
        gc.freeze()


def _open_streams() -> None:
    # A shell may close them: `>&-`. Python has None there, which nothing can print to, and the
    # next file that is opened would get their numbers.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # Open to the end, and without pathlib, which takes time to import.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no letter for α gets its code, instead of a traceback.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")


def _run() -> None:
    # Here, since they take a tenth of a second in which Ctrl-C may come.
    from diffxfer.cli.app import app
    from diffxfer.cli.console import as_known, print_error
    from diffxfer.errors import OptionError

    try:
        app(prog_name="diffxfer")
    except Exception as exc:
        known = as_known(exc)
        if known is None or os.environ.get("DIFFXFER_DEBUG") == "1":
            raise
        print_error(known)
        sys.exit(2 if isinstance(known, OptionError) else 1)
