"""The console of `diffxfer probe`: what was measured, and what each figure means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.cli.console import Console, print_json, print_warnings
from diffxfer.cli.distance_table import print_distances
from diffxfer.cli.probe_table import print_measured
from diffxfer.probing.probe_page import DATA, PAGE

if TYPE_CHECKING:
    from diffxfer.probing.report import ProbeReport


class ProbeConsole(Console):
    """The console of a probe; use it as a context manager.

    Args:
        json: print one JSON object on stdout, even for an error.
        quiet: print only the result, warnings and errors.
    """

    def show_probe(self, report: ProbeReport) -> None:
        """Print what was measured."""
        self._display.stop()
        if report.output is not None:
            self.say(f"wrote {report.output / PAGE} and {DATA} beside it")
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
