"""What a probe needs besides weights, read and checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.adapters.config import is_adapter
from diffxfer.checkpoints.beside import Beside
from diffxfer.checkpoints.companions import read_config
from diffxfer.checkpoints.resolve import find
from diffxfer.diffs.vocab.tokens import read_templates
from diffxfer.errors import EvaluationError
from diffxfer.models.checkpoint import open_plain
from diffxfer.models.loading import has_tokenizer
from diffxfer.probing.model_memory import plan_memory
from diffxfer.probing.row_data import PREDICTS, model_kind, read_probe_rows, shipped_rows
from diffxfer.probing.scoring import make_score

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.probing.model_memory import MemoryPlan
    from diffxfer.probing.probe_options import ProbeOptions
    from diffxfer.probing.row_data import ProbeRows
    from diffxfer.probing.scoring import Score


@dataclass(frozen=True, slots=True)
class ProbeInputs:
    """What the measurements of loaded models need besides the models.

    Attributes:
        memory: the memory that the models need, and their dtype.
        rows: the rows that the user gave; None for none.
        path_rows: the rows on which the loss along a path is measured: the same, or a text that
            ships.
        score: scores a loaded model on the tasks; None without tasks.
    """

    memory: MemoryPlan
    rows: ProbeRows | None
    path_rows: ProbeRows | None
    score: Score | None


def read_inputs(named: Mapping[str, str], options: ProbeOptions) -> ProbeInputs:
    """Read rows and tasks, and check that models fit in memory; of weights only headers are read.

    Args:
        named: the models as the user named them, by role.
        options: what is measured.

    Raises:
        EvaluationError: if models do not fit in memory, or cannot be asked what was given.
        DiffxferError: if a model is no sound checkpoint, or for rows or tasks that cannot be read.
    """
    whole = _open(named)
    memory = plan_memory([found.tensors for found in whole.values()], options.device)
    reading = whole if options.measures else {"base": whole["base"]}
    for role, found in reading.items():
        if not has_tokenizer(found.folder):
            problem = "has no tokenizer, so it cannot read a text"
            raise EvaluationError(role, problem, "copy the files of its tokenizer into it")
    # An adapter has the config of the model that it is for.
    first = whole.get("finetuned", whole["base"])
    configs = [read_config(found.folder) for found in (first, *whole.values())]
    score = None
    if options.settings is not None:
        _refuse_other_kinds(configs[0])
        score = make_score(options.settings)
    limits: dict[str, Any] = {"limit": options.rows, "seed": options.seed}
    rows = None
    if options.data is not None:
        rows = read_probe_rows(options.data, configs, **limits)
        rows = replace(rows, template=_template(named))
    path_rows = shipped_rows(configs, **limits) if rows is None else rows
    return ProbeInputs(memory, rows, path_rows, score)


def _open(named: Mapping[str, str]) -> dict[str, Checkpoint]:
    """The models that are no adapters, by role."""
    return {
        role: open_plain(model)
        for role, model in named.items()
        if role in ("base", "target") or not is_adapter(find(model, "a model"))
    }


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    kind = model_kind(config)
    if kind != "causal":
        raise EvaluationError(
            "--tasks",
            f"lm-eval asks models that predict the next token, and finetuned {PREDICTS[kind]}",
            "give --data instead",
        )


def _template(named: Mapping[str, str]) -> str | None:
    """The first chat template: base models have none, and read the rows as fine-tunes do."""
    for role in ("finetuned", "direct", "target", "base"):
        if role in named:
            found = read_templates(Beside(find(named[role], "a model").folder))
            if found:
                return found[0][1]
    return None
