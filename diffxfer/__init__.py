"""Diff-vector transfer: move what fine-tuning did to a base model onto its successor.

`extract_diff` writes Δ = finetuned − base, `apply_diff` grafts it on a newer base as
target + α·Δ, and `transfer` does both in one pass; `verify` reads again what they wrote; `tune`
trains a model further, `evaluate` measures whether it worked, and `iterate` goes round after round.
`inspect_checkpoint` says what a folder of weights is, and `compare_checkpoints` how two of them
differ; `probe` measures beforehand whether a graft will work; `push` publishes what was made.
`load_graft` and `load_path` give models in memory, of which nothing is written. `RayCluster` is
where several of them do their work on more than one machine. Each is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffxfer.errors import DiffxferError

if TYPE_CHECKING:
    from diffxfer.cluster.ray_cluster import RayCluster
    from diffxfer.diffs.extraction.extract import extract_diff
    from diffxfer.diffs.grafting.graft import apply_diff, transfer
    from diffxfer.diffs.inspection.compare import compare_checkpoints
    from diffxfer.diffs.inspection.comparison import Comparison
    from diffxfer.diffs.inspection.describe import inspect_checkpoint
    from diffxfer.diffs.inspection.description import Inspection
    from diffxfer.diffs.jobs.report import Report
    from diffxfer.diffs.verification.verify import VerifyReport, verify
    from diffxfer.evaluation.evaluate import evaluate
    from diffxfer.evaluation.scores import Evaluation, Row
    from diffxfer.models.load import load_graft, load_path
    from diffxfer.models.loading import LoadedModel
    from diffxfer.probing.distances import Distances
    from diffxfer.probing.probe import probe
    from diffxfer.probing.report import ProbeReport
    from diffxfer.publishing.push import push
    from diffxfer.publishing.push_report import PushedFile, PushReport
    from diffxfer.recycling.chain_report import ChainReport, Round
    from diffxfer.recycling.iterate import iterate
    from diffxfer.recycling.training_report import TuneReport
    from diffxfer.recycling.tune import tune

    __version__: str

# Importing them here would slow every command: numpy, pydantic, tokenizers and more.
_HOMES = {
    "ChainReport": "recycling.chain_report",
    "Comparison": "diffs.inspection.comparison",
    "Distances": "probing.distances",
    "Evaluation": "evaluation.scores",
    "Inspection": "diffs.inspection.description",
    "LoadedModel": "models.loading",
    "ProbeReport": "probing.report",
    "PushReport": "publishing.push_report",
    "PushedFile": "publishing.push_report",
    "RayCluster": "cluster.ray_cluster",
    "Report": "diffs.jobs.report",
    "Round": "recycling.chain_report",
    "Row": "evaluation.scores",
    "TuneReport": "recycling.training_report",
    "VerifyReport": "diffs.verification.verify",
    "apply_diff": "diffs.grafting.graft",
    "compare_checkpoints": "diffs.inspection.compare",
    "evaluate": "evaluation.evaluate",
    "extract_diff": "diffs.extraction.extract",
    "inspect_checkpoint": "diffs.inspection.describe",
    "iterate": "recycling.iterate",
    "load_graft": "models.load",
    "load_path": "models.load",
    "probe": "probing.probe",
    "push": "publishing.push",
    "transfer": "diffs.grafting.graft",
    "tune": "recycling.tune",
    "verify": "diffs.verification.verify",
}

__all__ = [
    "ChainReport",
    "Comparison",
    "DiffxferError",
    "Distances",
    "Evaluation",
    "Inspection",
    "LoadedModel",
    "ProbeReport",
    "PushReport",
    "PushedFile",
    "RayCluster",
    "Report",
    "Round",
    "Row",
    "TuneReport",
    "VerifyReport",
    "__version__",
    "apply_diff",
    "compare_checkpoints",
    "evaluate",
    "extract_diff",
    "inspect_checkpoint",
    "iterate",
    "load_graft",
    "load_path",
    "probe",
    "push",
    "transfer",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        found: Any = version("diffxfer")
    elif name in _HOMES:
        found = getattr(import_module(f"diffxfer.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'diffxfer' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
