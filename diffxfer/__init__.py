"""Diff-vector transfer: move what fine-tuning did to a base model onto its successor.

`extract_diff` writes Δ = finetuned − base, `apply_diff` grafts it on a newer base as
target + α·Δ, and `transfer` does both in one pass; `tune` trains a model further, `evaluate`
measures whether it worked, `iterate` goes round after round, and `push` publishes what was made.
Importing this package imports no torch.
"""

from __future__ import annotations

from importlib.metadata import version

from diffxfer.diffs.extract import extract_diff
from diffxfer.diffs.graft import apply_diff, transfer
from diffxfer.diffs.report import Report
from diffxfer.errors import DiffxferError
from diffxfer.evaluation.evaluate import evaluate
from diffxfer.evaluation.scores import Evaluation, Row
from diffxfer.publishing.push import push
from diffxfer.publishing.report import PushedFile, PushReport
from diffxfer.recycling.chain_report import ChainReport, Round
from diffxfer.recycling.iterate import iterate
from diffxfer.recycling.report import TuneReport
from diffxfer.recycling.tune import tune

__version__ = version("diffxfer")

__all__ = [
    "ChainReport",
    "DiffxferError",
    "Evaluation",
    "PushReport",
    "PushedFile",
    "Report",
    "Round",
    "Row",
    "TuneReport",
    "__version__",
    "apply_diff",
    "evaluate",
    "extract_diff",
    "iterate",
    "push",
    "transfer",
    "tune",
]
