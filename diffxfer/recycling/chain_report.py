"""The result of a chain, round by round."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.hub.repo_ids import shown_name
from diffxfer.evaluation.scores import TaskScore
from diffxfer.recycling.chain_plan import CONTROLS, round_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffxfer.evaluation.scores import MetricKey
    from diffxfer.recycling.recipe import Recipe

STAGES = ("base", "graft", "tuned", *CONTROLS)
"""The models that a round may score: base, graft, tuned graft, and what is trained to compare it.

The first four are the columns of table 6 in Lin et al. 2025; in round 1, the tuned model is M*1.
With a teacher, the last four are the arms of Qin et al. 2023: both, plain, initialised, distilled.
"""

_GRAFTED = ("graft", "tuned", "initialised")
_SCORE_FIELDS = tuple(field.name for field in fields(TaskScore))


@dataclass(frozen=True, slots=True)
class Round:
    """One round.

    Attributes:
        number: 1 for the first base.
        base: the name of the base.
        alpha: the scale of the graft; None in round 1.
        scores: by stage, one row for each measure, with the fields of `diffxfer.Row`.
        losses: by trained model, ``"model"`` or one of `CONTROLS`, the number and loss of each
            step.
    """

    number: int
    base: str
    alpha: float | None
    scores: dict[str, list[dict[str, Any]]]
    losses: dict[str, list[dict[str, float]]]

    def row(self, column: str, measure: MetricKey) -> dict[str, Any] | None:
        """A score; None if the model was not scored.

        Args:
            column: one of `STAGES`.
            measure: the task, metric and filter.
        """
        for row in self.scores.get(column, ()):
            if (row["task"], row["metric"], row["filter"]) == measure:
                return row
        return None

    def best(self, measure: MetricKey) -> float | None:
        """The best value of the round; None if there is nothing to compare.

        Args:
            measure: the task, metric and filter.
        """
        found = (self.row(column, measure) for column in self.scores)
        rows = [row for row in found if row is not None and row["value"] is not None]
        if len(rows) < 2 or rows[0]["higher_is_better"] is None:
            return None
        choose = max if rows[0]["higher_is_better"] else min
        return float(choose(row["value"] for row in rows))


def format_value(row: dict[str, Any]) -> str:
    """Format a score; a score that is not finite is None, as JSON has no NaN.

    Args:
        row: one of `Round.scores`.
    """
    return "nan" if row["value"] is None else f"{row['value']:.4f}"


@dataclass(frozen=True, slots=True)
class ChainReport:
    """The result of a chain.

    Attributes:
        run: the folder of the run.
        rounds: the rounds, in order.
        measures: the task, metric and filter of each requested score.
        recipe: the keys of the recipe that differ from their defaults, as JSON values.
        warnings: the warnings of all steps, one line each.
        steps_done: the number of steps run by this call; 0 if all steps were done before.
        elapsed_s: the duration of the call in seconds.
    """

    run: Path
    rounds: tuple[Round, ...]
    measures: tuple[MetricKey, ...]
    recipe: dict[str, Any]
    warnings: tuple[str, ...]
    steps_done: int
    elapsed_s: float

    def columns(self) -> list[str]:
        """The stages that at least one round has."""
        return [column for column in STAGES if any(column in each.scores for each in self.rounds)]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values, with all scores as flat rows, as in an evaluation."""
        return {"rows": self.rows(), **asdict(self), "run": str(self.run)}

    def rows(self) -> list[dict[str, Any]]:
        """Every score of every round.

        Returns:
            One row for each round, stage (see `STAGES`), task, metric and filter. `alpha` is the
            scale of the graft or tuned graft; None for models without a graft.
        """
        return [
            {
                "round": each.number,
                "base": each.base,
                "stage": stage,
                "alpha": each.alpha if stage in _GRAFTED else None,
                **{key: row[key] for key in _SCORE_FIELDS},
            }
            for each in self.rounds
            for stage in STAGES
            for row in each.scores.get(stage, ())
        ]


def make_report(
    recipe: Recipe, run: Path, done: Mapping[str, Any], steps_done: int, elapsed_s: float
) -> ChainReport:
    """Make the report of a chain from the results of its steps.

    Args:
        recipe: the recipe.
        run: the folder of the run.
        done: the result of each step, by key.
        steps_done: the number of steps run by this call.
        elapsed_s: the duration of the call in seconds.
    """
    rounds = []
    measures: dict[MetricKey, None] = {}
    for number, base in enumerate(recipe.bases, 1):
        found = {key: done.get(f"{round_name(number)}/{key}") for key in _STEPS_REPORTED}
        scored = found["scores"] or {"rows": [], "columns": []}
        scores: dict[str, list[dict[str, Any]]] = {}
        for row in scored["rows"]:
            scores.setdefault(row["model"], []).append(row)
        for task, metric, chosen in scored["columns"]:
            measures[task, metric, chosen] = None
        trained = {name: found[name] for name in ("model", *CONTROLS)}
        losses = {name: entry["log"] for name, entry in trained.items() if entry and "log" in entry}
        graft = found["graft"]
        alpha = None if graft is None else graft["alpha"]
        rounds.append(Round(number, shown_name(Path(base)), alpha, scores, losses))
    said = recipe.model_dump(mode="json", exclude_defaults=True)
    warnings = tuple(
        f"{key}: {warning}" for key, found in done.items() for warning in found.get("warnings", ())
    )
    return ChainReport(run, tuple(rounds), tuple(measures), said, warnings, steps_done, elapsed_s)


_STEPS_REPORTED = ("graft", "model", *CONTROLS, "scores")
