"""The companions of the model that an adapter makes of its base."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from diffxfer.checkpoints.companions import companion_path, list_companions

if TYPE_CHECKING:
    from diffxfer.checkpoints.stored import ShardFile

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_MODEL_FILES = ("config.json", "generation_config.json")

_overlays: list[tempfile.TemporaryDirectory[str]] = []


def has_tokenizer(shard: ShardFile) -> bool:
    """Whether an adapter has companions that set the behaviour of the fine-tuned model.

    Args:
        shard: the adapter's file.
    """
    names = (*_TOKENIZERS, "chat_template.jinja")
    return any(companion_path(shard.path.parent, name) is not None for name in names)


def adapted_folder(adapter: ShardFile, base: Path) -> Path:
    """A folder with base's companions, and the adapter's over them.

    Args:
        adapter: the adapter's file.
        base: base's folder.

    Returns:
        The adapter's own folder if it has a ``config.json``; else a temporary folder, which is
        removed at the end of the process.
    """
    own = adapter.path.parent
    if companion_path(own, "config.json") is not None:
        return own
    overlay = tempfile.TemporaryDirectory(prefix="diffxfer-")
    _overlays.append(overlay)
    made = Path(overlay.name)
    # An adapter's tokenizer replaces all of base's files that have to do with one.
    theirs = list_companions(base).names
    if has_tokenizer(adapter):
        theirs = tuple(name for name in theirs if name in _MODEL_FILES)
    for folder, names in ((base, theirs), (own, list_companions(own).names)):
        for name in names:
            path = companion_path(folder, name)
            if path is not None:
                (made / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, made / name)
    return made
