"""Config settings of a task head, which the output takes over if finetuned brings the head."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from diffxfer.errors import CompanionError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffxfer.checkpoints.json_edit import KeyPath

_HEAD_KEYS = re.compile(
    r"architectures|num_labels|id2label|label2id|problem_type|finetuning_task|num_choices"
    r"|(?:classifier|cls|pooler|pooling|score|summary|qa|head|label)_\w+"
    r"|\w+_(?:pooling|loss_reduction)|loss_type|use_weighted_layer_sum|seq_classif_dropout"
    r"|qa_dropout|regression|is_regression|semantic_loss_ignore_index"
)
_NO_HEAD_KEYS = frozenset({"cls_token", "head_dim", "head_ratio", "head_size", "label_smoothing"})


def head_changes(
    target: Mapping[str, Any], finetuned: Mapping[str, Any], where: Path
) -> tuple[dict[str | KeyPath, Any], list[str | KeyPath]]:
    """The changes to the target's config if it gets finetuned's task head.

    Args:
        target: the target's config.
        finetuned: finetuned's config.
        where: finetuned's config file, for error messages.

    Returns:
        New values by key, and the keys of the target's former head to remove.

    Raises:
        CompanionError: if finetuned's model type differs, so that the target cannot take its head.
    """
    kinds = finetuned.get("model_type"), target.get("model_type")
    if None not in kinds and kinds[0] != kinds[1]:
        raise CompanionError(
            where,
            f"model_type is {kinds[0]!r}, but the target's is {kinds[1]!r}, so the target's config"
            " cannot describe the head that fine-tuning added",
            "give --added drop to leave it out",
        )
    changes: dict[str | KeyPath, Any] = {
        key: value for key, value in finetuned.items() if _is_of_head(key)
    }
    removals: list[str | KeyPath] = [
        key for key in target if _is_of_head(key) and key not in finetuned
    ]
    return changes, removals


def _is_of_head(key: str) -> bool:
    if key in _NO_HEAD_KEYS or key.endswith(("_token_id", "_token_ids")):
        return False  # token ids come from the target, or are translated
    return _HEAD_KEYS.fullmatch(key) is not None
