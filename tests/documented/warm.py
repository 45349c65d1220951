"""A process that has imported all that scoring and training need, and forks for every command.

All commands meet the same Hub, so its environment is there before anything is imported.
"""

from __future__ import annotations

import contextlib
from importlib import import_module

from tests.hub.forks import serve

IMPORTED = (
    *("diffxfer.cli.app", "diffxfer.diffs.extraction.extract", "diffxfer.diffs.grafting.graft"),
    *("diffxfer.evaluation.evaluate", "diffxfer.evaluation.harness", "diffxfer.streaming.engine"),
    # What commands import only once they need it, which takes seconds.
    *("datasets", "lm_eval.loggers", "lm_eval.models.huggingface", "scipy.stats"),
    "transformers.models.llama.modeling_llama",
)


def skip_inventory() -> None:
    """Let lm-eval find no pip, compiler or driver to ask for its results' list of versions.

    It starts a dozen programs for every model that it scores, which takes a second.
    """
    from torch.utils import collect_env

    collect_env.run = lambda _command: (1, "", "")


if __name__ == "__main__":
    for name in IMPORTED:
        import_module(name)
    with contextlib.suppress(ImportError):  # TRL needs Python 3.11
        import_module("diffxfer.recycling.trainer")
        import_module("diffxfer.recycling.causal_trainer")
        import_module("diffxfer.recycling.encoder_trainer")
        import_module("diffxfer.recycling.trainer_config")
    skip_inventory()
    serve()
