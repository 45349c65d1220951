"""Reading the scores, and the value of each sample, from the results of lm-eval."""

from __future__ import annotations

from collections import Counter
from numbers import Real
from typing import TYPE_CHECKING, Any

from diffxfer.evaluation.scores import SampleKey, Samples, SampleValue, Score

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_STDERR = "_stderr"


def read_scores(results: Mapping[str, Any], samples: Mapping[str, Any]) -> list[Score]:
    """Read all scores, in the order of lm-eval.

    Args:
        results: the result of `simple_evaluate`, or the content of a results file.
        samples: the samples by task, from the same result or from samples files.

    Returns:
        One score for each number: by task or group, metric and filter.
    """
    found = []
    for task, numbers in results["results"].items():
        leaves = _leaves(task, results.get("group_subtasks", {}))
        better = results.get("higher_is_better", {}).get(task) or {}
        for key, value in numbers.items():
            metric, comma, filter_name = key.rpartition(",")
            if not comma or metric.endswith(_STDERR) or not _is_number(value):
                continue  # NaN and infinity are numbers here, so that the user sees them
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
    """The tasks of a group; for a task, the task itself."""
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
    """The value of each sample; empty if one of them is not a number."""
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
    """Whether this is a number of Python or numpy; lm-eval writes "N/A" for a missing number."""
    return isinstance(value, Real) or type(value).__name__ == "bool_"  # of numpy
