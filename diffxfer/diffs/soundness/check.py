"""Checking the consistency of models before use, and of a result before it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.beside import Beside
from diffxfer.diffs.soundness.finding import Finding
from diffxfer.diffs.soundness.model import Owners, read_model
from diffxfer.diffs.soundness.shapes import shape_findings
from diffxfer.diffs.soundness.stops import id_findings, stop_findings
from diffxfer.diffs.soundness.token_rows import idle_findings, token_findings
from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.checkpoints.stored import StoredTensor
    from diffxfer.diffs.soundness.model import Model, Shaped
    from diffxfer.streaming.plan import TensorTask


def find_contradictions(model: Model, *, whole: bool = True) -> list[Finding]:
    """The contradictions between the files of a model; errors first, then warnings.

    Args:
        model: the model.
        whole: whether all of its tensors are present, with meaningful shapes.
    """
    found = [*token_findings(model), *id_findings(model), *stop_findings(model)]
    if whole:
        found += shape_findings(model)
    return _worst_first(found)


def _worst_first(found: list[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: finding.severity)


def inspect_files(
    folder: Path, tensors: Mapping[str, StoredTensor], *, whole: bool
) -> tuple[Finding, ...]:
    """The contradictions in a folder; an unreadable file counts as one.

    Args:
        folder: the folder of the companions.
        tensors: the tensors that they belong to.
        whole: whether these are all tensors of a model, with meaningful shapes.
    """
    try:
        model = read_model(Beside(folder), tensors)
        found = find_contradictions(model, whole=whole)
        found += idle_findings(model)
    except CompanionError as exc:
        name = exc.where.removeprefix(f"{folder}/")
        found = [Finding("error", name, "", exc.problem, exc.remedy)]
    return tuple(found)


def check_roles(*checkpoints: Checkpoint, graft: bool) -> list[str]:
    """Refuse a role whose files contradict each other.

    Args:
        checkpoints: the roles.
        graft: whether they are made into a graft. The graft itself is checked later, and has
            finetuned's behaviour, so warnings about that behaviour are left to that check.

    Returns:
        Warnings, one line each; for base and target, only about weights and sizes.

    Raises:
        CompanionError: a role's files have an error.
    """
    warnings = []
    for checkpoint in checkpoints:
        model = read_model(Beside(checkpoint.folder), checkpoint.tensors)
        shapes = [*shape_findings(model)]
        found = _worst_first([*find_contradictions(model, whole=False), *shapes])
        _refuse(found, str(checkpoint.folder))
        own = checkpoint.role == "finetuned" and not graft
        said = found if own else shapes
        # The graft has the target's weights and config, and is checked itself.
        if checkpoint.role != "target":
            warnings += [f"{checkpoint.role}: {finding}" for finding in said]
    return warnings


def check_diff(companions: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a diff vector whose companions contradict each other.

    Args:
        companions: finetuned's, in the diff vector.
        tensors: the differences.

    Raises:
        CompanionError: the companions have an error.
    """
    model = read_model(Beside(companions), tensors)
    _refuse(find_contradictions(model, whole=False), str(companions))


def check_result(files: Mapping[str, bytes | Path], tasks: Iterable[TensorTask]) -> list[str]:
    """Refuse a graft whose files would contradict each other, before anything is written.

    Args:
        files: its companions by name.
        tasks: the tasks that make its tensors; none if it is refused anyway.

    Returns:
        Warnings, one line each.

    Raises:
        CompanionError: its files would have an error.
    """
    from pathlib import Path

    tensors: dict[str, Shaped] = {task.name: task for task in tasks if task.shard is not None}
    if not tensors:
        return []
    owners = Owners(embedding="the target's", behaviour="finetuned's")
    found = find_contradictions(read_model(Beside(Path("the graft"), files), tensors, owners))
    _refuse(found, "the graft")
    return [f"the graft: {finding}" for finding in found]


def _refuse(found: Iterable[Finding], where: str) -> None:
    errors = [finding for finding in found if finding.severity == "error"]
    if not errors:
        return
    first = errors[0]
    more = f" ({len(errors) - 1} more of this kind)" if len(errors) > 1 else ""
    raise CompanionError(
        f"{where}/{first.file}", f"{first.value} {first.problem}{more}", first.remedy
    )
