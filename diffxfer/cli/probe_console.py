"""The console of `diffxfer probe`: what was measured, and what each figure means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli.console import Console, print_json, print_warnings
from diffxfer.cli.distance_table import print_distances
from diffxfer.cli.probe_table import print_measured
from diffxfer.probing.probe import NAMES

if TYPE_CHECKING:
    from diffxfer.probing.report import ProbeReport


class ProbeConsole(Console):
    """The console of a probe; use it as a context manager.

    Args:
        json: print one JSON object on stdout, even for an error.
        quiet: print only the result, warnings and errors.
        loads: whether models are loaded, so that what libraries print goes to a log.
    """

    _keeps_log = False

    def __init__(self, *, json: bool, quiet: bool, loads: bool) -> None:
        super().__init__(json=json, quiet=quiet, logs=loads)

    def begin(self, line: str) -> None:
        """Say which work begins."""
        self._display.stop()
        self.say(line)

    def show_probe(self, report: ProbeReport) -> None:
        """Print what was measured."""
        self._display.close_log(None, keep=False)
        if report.output is not None:
            page, data = NAMES
            self.say(f"wrote {report.output / page} and {data} beside it")
        if self._json:
            print_json(report.as_json())
            return
        distances = report.distances
        self.say(f"read {gigabytes(distances.bytes_read)} in {distances.elapsed_s:.1f} s")
        for note in distances.notes:
            self.say(note)
        print_distances(report.models, distances)
        print_measured(report)
        print_warnings(report.warnings)
