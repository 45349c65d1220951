"""The steps of a chain, planned from the recipe alone, without I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.recycling.recipe import PREVIOUS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from diffxfer.recycling.recipe import Recipe

ROUNDS_AT_ONCE = 2
"""How many rounds may run at once on a cluster, so that few folders wait for later steps."""


CONTROLS = ("direct", "initialised", "distilled")
"""The models that are trained for comparison: no other model is made of them, except that mode dir
takes Δ from ``"direct"``."""


class StepKind(Enum):
    """The kinds of step."""

    MERGE = "merge"
    """Makes the model base + Δ of the LoRA adapter `inputs[0]` and its base `inputs[1]`."""
    TUNE = "tune"
    """Trains `inputs[0]`, with `inputs[1]` as the teacher if there is one."""
    EXTRACT = "extract"
    """Writes `inputs[0]` − `inputs[1]`."""
    CHOOSE = "choose"
    """Scores grafts of `inputs[0]` on `inputs[1]` at each alpha; keeps no folder."""
    GRAFT = "graft"
    """Grafts `inputs[0]` on `inputs[1]`; for a LoRA adapter, `inputs[2]` is its base."""
    SCORE = "score"
    """Scores all of `inputs`, whose stages are `columns`."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a chain.

    Attributes:
        round: 1 for the first base.
        name: its result: ``"graft"``, ``"model"``, one of `CONTROLS`, ``"diff"``, ``"alpha"`` or
            ``"scores"``.
        kind: what it does.
        inputs: the folders that it reads.
        out: the folder that it writes; None for a step that keeps none.
        columns: for a step that scores, the stage of each input: ``"base"``, ``"graft"``,
            ``"tuned"``, or one of `CONTROLS`.
    """

    round: int
    name: str
    kind: StepKind
    inputs: tuple[Path, ...]
    out: Path | None
    columns: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name of the step in the state file: its folder, relative to the run."""
        return f"{round_name(self.round)}/{self.name}"


def round_name(number: int) -> str:
    """The name of the folder of a round."""
    return f"round-{number:02}"


def plan_chain(recipe: Recipe, run: Path, *, is_adapter: bool = False) -> tuple[Step, ...]:
    """Plan every step of a chain, in order.

    Args:
        recipe: the recipe.
        run: the folder of the run.
        is_adapter: whether the recipe's `finetuned` is a LoRA adapter. It is then grafted itself,
            and a diff vector or a model is made of it only if a step needs one.
    """
    chain = _Planner(recipe, run, is_adapter=is_adapter)
    chain.plan_first_round()
    for number in range(2, len(recipe.bases) + 1):
        chain.plan_round(number)
    return tuple(chain.steps)


class _Planner:
    """Collects the steps of a chain and remembers the models of the last round."""

    def __init__(self, recipe: Recipe, run: Path, *, is_adapter: bool) -> None:
        self._recipe = recipe
        self._run = run
        self._adapter = Path(recipe.finetuned or "") if is_adapter else None
        self.steps: list[Step] = []
        self._model = Path()
        self._direct: Path | None = None
        self._diff = Path()

    def plan_first_round(self) -> None:
        """Plan round 1: the first base and its fine-tuned model M*1."""
        base = Path(self._recipe.bases[0])
        if self._adapter is not None:
            self._model = self._merge(self._adapter, base)
        elif self._recipe.finetuned is not None:
            self._model = Path(self._recipe.finetuned)
        else:
            self._model = self._add(1, "model", StepKind.TUNE, base)
        self._direct = self._model  # M*1 is the first base, fine-tuned directly
        self._score(1, {"base": base, "tuned": self._model})
        if self._adapter is None or len(self._recipe.alphas) > 1:
            self._next_diff(1, self._adapter)

    def _merge(self, adapter: Path, base: Path) -> Path:
        """Make the model of an adapter, if a step scores it or learns from it."""
        train = self._recipe.train
        teacher = None if train is None else train.teacher
        is_taught = teacher is not None and (teacher == PREVIOUS or Path(teacher) == adapter)
        if self._recipe.eval is None and not is_taught:
            return adapter
        return self._add(1, "model", StepKind.MERGE, adapter, base)

    def plan_round(self, number: int) -> None:
        """Plan round i: graft Δ on the next base, tune, score, and extract the next Δ."""
        recipe = self._recipe
        base = Path(recipe.bases[number - 1])
        if len(recipe.alphas) > 1:
            self._add(number, "alpha", StepKind.CHOOSE, self._diff, base, folder=False)
        graft = self._add(number, "graft", StepKind.GRAFT, *self._sources(number))
        models = {"base": base, "graft": graft}
        teachers = self._teachers()
        self._model = graft
        if recipe.train is not None:
            self._model = self._add(number, "model", StepKind.TUNE, graft, *teachers)
            models["tuned"] = self._model
        last = number == len(recipe.bases)
        trained = {"direct": (base,), "initialised": (graft,), "distilled": (base, *teachers)}
        for name, inputs in trained.items():
            wanted = name == "direct" and recipe.mode == "dir" and not last
            if wanted or name in recipe.controls:
                models[name] = self._add(number, name, StepKind.TUNE, *inputs)
        self._direct = models.get("direct")
        self._score(number, models)
        if not last:
            self._next_diff(number)

    def _sources(self, number: int) -> tuple[Path, ...]:
        """What a round grafts, on what.

        An adapter is grafted itself: its Δ takes four times the model if it is stored exactly.
        """
        base = Path(self._recipe.bases[number - 1])
        if number == 2 and self._adapter is not None:
            return self._adapter, base, Path(self._recipe.bases[0])
        return self._diff, base

    def _teachers(self) -> list[Path]:
        """The teacher of the next round; for the adapter, the model made of it."""
        teacher = None if self._recipe.train is None else self._recipe.train.teacher
        if teacher is None:
            return []
        if teacher == PREVIOUS:
            return [self._model]
        is_adapter = self._adapter is not None and Path(teacher) == self._adapter
        return [self._run / round_name(1) / "model" if is_adapter else Path(teacher)]

    def _next_diff(self, number: int, adapter: Path | None = None) -> None:
        base = Path(self._recipe.bases[number - 1])
        source = adapter or (self._direct if self._recipe.mode == "dir" else self._model)
        assert source is not None, "mode dir fine-tunes every base but the last directly"
        self._diff = self._add(number, "diff", StepKind.EXTRACT, source, base)

    def _score(self, number: int, models: dict[str, Path]) -> None:
        if self._recipe.eval is None:
            return
        wanted = {
            column: folder
            for column, folder in models.items()
            if column not in ("base", *CONTROLS) or column in self._recipe.controls
        }
        columns = tuple(wanted)
        out = self._run / round_name(number) / "scores"
        self.steps.append(
            Step(number, "scores", StepKind.SCORE, tuple(wanted.values()), out, columns)
        )

    def _add(
        self, number: int, name: str, kind: StepKind, *inputs: Path, folder: bool = True
    ) -> Path:
        out = self._run / round_name(number) / name
        self.steps.append(Step(number, name, kind, inputs, out if folder else None))
        return out


def removable_folders(steps: Sequence[Step], done: Iterable[str], keep: str) -> list[Path]:
    """The folders that no step needs any more and that the recipe does not keep.

    Args:
        steps: all steps of the chain.
        done: the keys of the steps that are done.
        keep: which folders to keep: ``"all"``, ``"models"`` or ``"last"``.
    """
    finished = set(done)
    # In a round without training, the graft is the model.
    trained = {step.round for step in steps if step.name == "model"}
    last = max(step.round for step in steps)
    found = []
    for step in steps:
        temporary = step.name == "diff" or (step.name == "graft" and step.round in trained)
        earlier = step.round < last or step.name in CONTROLS
        wanted = keep == "all" or not (temporary or (keep == "last" and earlier))
        if wanted or step.out is None or step.kind is StepKind.SCORE or step.key not in finished:
            continue
        readers = (other for other in steps if step.out in other.inputs)
        if all(reader.key in finished for reader in readers):
            found.append(step.out)
    return found
