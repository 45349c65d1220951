"""The console of `diffxfer eval`: a table or a JSON object, even of a partial result."""

from __future__ import annotations

import sys
from types import TracebackType

from diffxfer.cli.console import Console, as_known, print_interrupted, print_json, print_warnings
from diffxfer.cli.display import hush_stdout
from diffxfer.cli.findings import error_as_json
from diffxfer.cli.score_table import print_scores
from diffxfer.evaluation.scores import Evaluation


class EvalConsole(Console):
    """The console of an evaluation; use it as a context manager.

    While it is open, the output of lm-eval and its libraries goes to a log.

    Args:
        json: print one JSON object on stdout, even for an error.
        quiet: print only the result, warnings and errors.
    """

    def __init__(self, *, json: bool, quiet: bool) -> None:
        super().__init__(json=json, quiet=quiet, logs=True, stage="scoring")
        self._known: Evaluation | None = None

    def keep(self, evaluation: Evaluation) -> None:
        """Store the scores: all of them, or those scored before a failure."""
        self._known = evaluation

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        log = self._end(exc)
        known = as_known(exc)
        if exc is None or known is not None or isinstance(exc, KeyboardInterrupt):
            self._print({} if known is None else {"error": error_as_json(known, log)})
            hush_stdout()
        if isinstance(exc, KeyboardInterrupt):
            sys.exit(print_interrupted(exc, self._left()))

    def _print(self, error: dict[str, object]) -> None:
        """Print the scores: all of them, or those scored before a failure."""
        if self._json:
            print_json({**(self._known.as_json() if self._known else {"rows": []}), **error})
        elif self._known is not None:
            print_scores(self._known)
        if self._known is not None:
            print_warnings(self._known.warnings)

    def _left(self) -> str:
        if self._known is None:
            return "no model was scored yet"
        if self._known.output is None:
            return "the finished scores are above; --output DIR would keep them for the next run"
        return f"finished scores are kept in {self._known.output}; run it again to continue"
