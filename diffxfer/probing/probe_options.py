"""The options of a probe, checked before a model is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.evaluation.eval_settings import EvalSettings


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """What is measured besides distances, and how.

    Attributes:
        data: the rows; None for none.
        settings: the tasks of lm-eval; None for none.
        alphas: the scales of Δ.
        points: the number of points of a path.
        forward: whether base reads a text, for a better forecast.
        rows: the most rows of the data.
        batch_size: the most rows that go through a model together.
        device: where models run.
        seed: of the choice of rows, of permutations and of resamples.
        output: the folder of the page; None for none.
    """

    data: str | None
    settings: EvalSettings | None
    alphas: tuple[float, ...]
    points: int
    forward: bool
    rows: int
    batch_size: int
    device: str
    seed: int
    output: Path | None

    @property
    def measures(self) -> bool:
        """Whether rows or tasks are given, on which models are measured."""
        return self.data is not None or self.settings is not None

    @property
    def loads_models(self) -> bool:
        """Whether a model is loaded."""
        return self.forward or self.measures


def check_probe_options(
    *,
    data: Path | str | None,
    tasks: Sequence[str] | str | None,
    include_path: Path | str | None,
    limit: float | None,
    alpha: Sequence[float] | float,
    points: int,
    forward: bool,
    rows: int,
    batch_size: int,
    device: str | None,
    seed: int,
    output: Path | str | None,
) -> ProbeOptions:
    """Check the arguments of `probe` that concern loaded models.

    Args:
        data: see `ProbeOptions`.
        tasks: names of lm-eval tasks.
        include_path: a folder of custom tasks.
        limit: the most questions of a task.
        alpha: one scale or several.
        points: see `ProbeOptions`.
        forward: see `ProbeOptions`.
        rows: see `ProbeOptions`.
        batch_size: see `ProbeOptions`.
        device: see `ProbeOptions`; None for a GPU if there is one.
        seed: see `ProbeOptions`.
        output: see `ProbeOptions`.

    Raises:
        OptionError: if a value is invalid.
    """
    alphas = (float(alpha),) if isinstance(alpha, int | float) else tuple(map(float, alpha))
    if not alphas:
        raise OptionError("--alpha", "names no scale", "give one or more, such as 0.6,0.8,1.0")
    for name, value, least in (
        ("--points", points, 2),
        ("--rows", rows, 1),
        ("--batch-size", batch_size, 1),
    ):
        if value < least:
            raise OptionError(name, f"{value} is below {least}", f"give {least} or more")
    settings = _settings(tasks, include_path, limit, batch_size, device, seed)
    if settings is None and (include_path is not None or limit is not None):
        option = "--limit" if include_path is None else "--include-path"
        raise OptionError(option, "applies to tasks only", "give --tasks too, or leave it out")
    return ProbeOptions(
        data=None if data is None else str(data),
        settings=settings,
        alphas=tuple(dict.fromkeys(alphas)),
        points=points,
        forward=forward,
        rows=rows,
        batch_size=batch_size,
        device=_device(device, bool(forward or data or settings)),
        seed=seed,
        output=None if output is None else Path(output),
    )


def _settings(
    tasks: Sequence[str] | str | None,
    include_path: Path | str | None,
    limit: float | None,
    batch_size: int,
    device: str | None,
    seed: int,
) -> EvalSettings | None:
    if not tasks:
        return None
    from diffxfer.evaluation.eval_settings import make_settings

    return make_settings(
        tasks=tasks,
        include_path=None if include_path is None else Path(include_path),
        num_fewshot=None,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype="auto",
        apply_chat_template=False,
        fewshot_as_multiturn=None,
        system_instruction=None,
        gen_kwargs=None,
        backend="hf",
        model_args=None,
        seed=seed,
        trust_remote_code=False,
    )


def _device(device: str | None, loads: bool) -> str:
    if device is not None or not loads:
        return device or "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
