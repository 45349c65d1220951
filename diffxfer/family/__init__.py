"""A family of tiny Llamas trained on real text, small enough to ship: try every command on it.

The folder holds four checkpoints in bfloat16 (`base`, its continuation `target`, and a fine-tune
of each on one task, `finetuned` and `direct`), two LoRA adapters of base that learned the task too
(`adapter`, and `small-adapter` of 19 kB, which gets two words of three right;
`examples/train_adapter.py` made both), the held-out questions of that task (`task.jsonl`),
held-out text of the kind that `target` was trained on (`text.txt`: docstrings of Hugging Face's
accelerate 1.15.0, Apache-2.0, shuffled and cut), what the members and grafts scored on both when
they were made (`scores.json`), and lm-eval tasks that ask for both (`tasks`: `pig_latin`,
`pig_latin_choice`, `docstrings`). `examples/train_family.py` made the rest except the tasks.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["family_folder"]


def family_folder() -> Path:
    """Return the folder of the shipped family.

    Example:
        `diffxfer transfer $F/finetuned $F/base $F/target out`, where
        `F=$(python -m diffxfer.family)`.

    Returns:
        A folder with `base`, `target`, `finetuned`, `direct`, `adapter`, `small-adapter`,
        `task.jsonl`, `text.txt`, `scores.json` and `tasks`.
    """
    return Path(str(files(__name__)))
