"""Reading lm-eval's results: which numbers of them are scores, and what each sample counted for."""

from __future__ import annotations

from collections import Counter
from numbers import Real
from typing import TYPE_CHECKING, Any

from diffxfer.evaluation.scores import SampleKey, Samples, SampleValue, Score

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_STDERR = "_stderr"


def read_scores(results: Mapping[str, Any], samples: Mapping[str, Any]) -> list[Score]:
    """Every score in lm-eval's results, in its order.

    Args:
        results: what `simple_evaluate` returns, or what a file of its results holds.
        samples: by task, what it returns or what a file of samples holds.

    Returns:
        One score for each task or group that has a number, metric and filter.
    """
    found = []
    for task, numbers in results["results"].items():
        leaves = _leaves(task, results.get("group_subtasks", {}))
        better = results.get("higher_is_better", {}).get(task) or {}
        for key, value in numbers.items():
            metric, comma, filter_name = key.rpartition(",")
            if not comma or metric.endswith(_STDERR) or not _is_number(value):
                continue  # an infinite or undefined score is one to be seen
            stderr = numbers.get(f"{metric}{_STDERR},{filter_name}")
            measured = _samples(leaves, samples, metric, filter_name)
            found.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(stderr) if _is_number(stderr) else None,
                    n=_count(leaves, results, measured),
                    higher_is_better=better.get(metric),
                    samples=measured,
                )
            )
    return found


def _leaves(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a group stands for; a task stands for itself."""
    inner = subtasks.get(task)
    if not inner:
        return [task]
    return [leaf for name in inner for leaf in _leaves(name, subtasks)]


def _count(leaves: Iterable[str], results: Mapping[str, Any], samples: Samples) -> int:
    counts = results.get("n-samples", {})
    asked = sum(int(counts[leaf]["effective"]) for leaf in leaves if leaf in counts)
    return asked or len(samples)


def _samples(
    leaves: Sequence[str], samples: Mapping[str, Any], metric: str, filter_name: str
) -> dict[SampleKey, SampleValue]:
    """What each sample counted for; nothing if one of them is no number."""
    found: dict[SampleKey, SampleValue] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for leaf in leaves:
        for sample in samples.get(leaf, ()):
            if sample["filter"] != filter_name or metric not in sample:
                continue
            measure = _measure(sample[metric])
            if measure is None:
                return {}
            question = f"{leaf} {sample['doc_hash']}", str(sample["target_hash"])
            found[(*question, seen[question])] = measure
            seen[question] += 1
    return found


def _measure(value: Any) -> SampleValue | None:
    if _is_number(value):
        return float(value)
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)):
        return float(value[0]), float(value[1])
    return None


def _is_number(value: Any) -> bool:
    """Whether this is a number, numpy's too; lm-eval writes "N/A" where it has none."""
    return isinstance(value, Real) or type(value).__name__ == "bool_"  # of numpy
