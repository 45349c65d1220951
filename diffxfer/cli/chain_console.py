"""The console of `diffxfer iterate`: each next step, and tables at the end."""

from __future__ import annotations

from diffxfer.cli.chain_table import print_chain
from diffxfer.cli.console import Console, print_json, print_warnings
from diffxfer.recycling.chain_report import ChainReport

_KEPT = "finished steps are kept, and the same command continues from there"


class ChainConsole(Console):
    """The console of a chain; use it as a context manager.

    Args:
        json: print one JSON object on stdout, even for an error.
        quiet: print only the result, warnings and errors.
    """

    def __init__(self, *, json: bool, quiet: bool) -> None:
        super().__init__(
            json=json, quiet=quiet, logs=True, interrupted=_KEPT, stage="reading the recipe"
        )

    def show_chain(self, report: ChainReport) -> None:
        """Print the result of a chain."""
        self._display.close_log(None, keep=self._keeps_log)
        if self._json:
            print_json(report.as_json())
            return
        print_chain(report)
        print_warnings(report.warnings)
        if not report.steps_done:
            self.say("all rounds were already done")
        self.say(f"the full report is in {report.run / 'report.html'}")
