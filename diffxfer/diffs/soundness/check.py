"""Checking models before they are used, and a result before it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffxfer.checkpoints.beside import Beside
from diffxfer.checkpoints.quantized import refuse_quantized
from diffxfer.diffs.soundness.finding import Finding
from diffxfer.diffs.soundness.model import Owners, read_model
from diffxfer.diffs.soundness.shapes import shape_findings
from diffxfer.diffs.soundness.stops import id_findings, stop_findings
from diffxfer.diffs.soundness.token_rows import idle_findings, token_findings
from diffxfer.errors import CompanionError, QuantizedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from diffxfer.checkpoints.header import TensorSpec
    from diffxfer.checkpoints.reader import Checkpoint
    from diffxfer.diffs.soundness.model import Model, Shaped
    from diffxfer.streaming.plan import TensorTask


def find_contradictions(model: Model, *, whole: bool = True) -> list[Finding]:
    """What the files of a model say of each other that cannot be, or is odd; errors first.

    Args:
        model: the model.
        whole: whether all of its tensors are there, in shapes that mean something.
    """
    found = [*token_findings(model), *id_findings(model), *stop_findings(model)]
    if whole:
        found += shape_findings(model)
    return _worst_first(found)


def _worst_first(found: list[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: finding.severity)


def inspect_files(
    folder: Path, tensors: Mapping[str, TensorSpec], *, whole: bool
) -> tuple[Finding, ...]:
    """The contradictions in a folder; a file that cannot be read is one.

    Args:
        folder: where the companions are.
        tensors: the tensors that they belong to.
        whole: whether these are all tensors of a model, and not a diff vector's.
    """
    try:
        model = read_model(Beside(folder), tensors)
        found = find_contradictions(model, whole=whole and not _quantized(model, tensors))
        found += idle_findings(model)
    except CompanionError as exc:
        name = exc.where.removeprefix(f"{folder}/")
        found = [Finding("error", name, "", exc.problem, exc.remedy)]
    return tuple(found)


def _quantized(model: Model, tensors: Mapping[str, TensorSpec]) -> bool:
    try:
        refuse_quantized(model.files.folder, model.config, tensors)
    except QuantizedError:
        return True
    return False


def check_roles(*checkpoints: Checkpoint, graft: bool) -> list[str]:
    """Refuse a role whose files contradict each other.

    Args:
        checkpoints: the roles.
        graft: whether a graft is made of them, which is checked itself: what is odd in the
            behaviour of finetuned is odd in it.

    Returns:
        What is odd, a line each. Of base and target only their weights and sizes count.

    Raises:
        CompanionError: one of them cannot work.
    """
    warnings = []
    for checkpoint in checkpoints:
        model = read_model(Beside(checkpoint.folder), checkpoint.tensors)
        shapes = [*shape_findings(model)]
        found = _worst_first([*find_contradictions(model, whole=False), *shapes])
        _refuse(found, str(checkpoint.folder))
        own = checkpoint.role == "finetuned" and not graft
        said = found if own else shapes
        # The target's weights and config are the graft's.
        if checkpoint.role != "target":
            warnings += [f"{checkpoint.role}: {finding}" for finding in said]
    return warnings


def check_diff(companions: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """Refuse a diff vector whose companions contradict each other.

    Args:
        companions: finetuned's, in the diff vector.
        tensors: the differences.

    Raises:
        CompanionError: finetuned cannot have worked.
    """
    model = read_model(Beside(companions), tensors)
    _refuse(find_contradictions(model, whole=False), str(companions))


def check_result(files: Mapping[str, bytes | Path], tasks: Iterable[TensorTask]) -> list[str]:
    """Refuse a graft whose files would contradict each other; nothing is written yet.

    Args:
        files: its companions by name.
        tasks: what makes its tensors; none where it is refused anyway.

    Returns:
        What is odd in it, a line each.

    Raises:
        CompanionError: it would not work.
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
