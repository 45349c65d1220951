"""Running the command line: the only place where errors become text.

Slow imports happen inside `main`, so that it can report an interruption.
"""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Run the command line; errors with a known cause are printed as one line.

    Exit status: 0 for success, 1 for a failure, 2 for an invalid command line, 130 after Ctrl-C,
    143 after SIGTERM.
    """
    # By default Python collects garbage after 700 new objects, sometimes over all objects: for
    # 60,000 tensors that took a third of a command's time, and there are almost no cycles.
    gc.set_threshold(100_000, 10, 10)
    try:
        _open_streams()
        _run()
    except KeyboardInterrupt as exc:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process is already ending
        if "_DIFFXFER_COMPLETE" in os.environ:
            sys.exit(130)  # shell completion: print no message
        from diffxfer.cli.console import print_interrupted

        sys.exit(print_interrupted(exc))
    finally:
        # At exit Python would collect garbage among all of torch's objects: half a second.
        gc.freeze()


def _open_streams() -> None:
    # A shell may close the streams (`>&-`). Python then sets them to None, so printing would fail,
    # and the next file to be opened would get their descriptors.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # These stay open until the end; pathlib is avoided because importing it takes time.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        # Escape characters that the terminal's encoding lacks, such as α, instead of failing.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")


def _run() -> None:
    # Imported here: it takes a tenth of a second, during which Ctrl-C may come.
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
