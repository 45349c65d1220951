"""A process that has imported all that scoring and training need, and forks for every command.

All commands meet the same Hub, so its environment is there before anything is imported.
"""

from __future__ import annotations

import contextlib

from tests.hub.forks import serve

if __name__ == "__main__":
    import diffxfer.cli.main
    import diffxfer.diffs.extraction.extract
    import diffxfer.diffs.grafting.graft
    import diffxfer.evaluation.evaluate
    import diffxfer.streaming.engine

    with contextlib.suppress(ImportError):  # TRL needs Python 3.11
        import diffxfer.recycling.trainer  # noqa: F401
    serve()
