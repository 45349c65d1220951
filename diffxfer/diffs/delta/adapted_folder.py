"""The companions of the model that an adapter makes of its base."""

from __future__ import annotations

import atexit
import shutil
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from diffxfer.checkpoints.companions import companion_path, list_companions, read_object
from diffxfer.checkpoints.json_edit import edit_json
from diffxfer.checkpoints.scratch import scratch_folder
from diffxfer.diffs.companions.config_edit import paths_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffxfer.checkpoints.stored import ShardFile

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_MODEL_FILES = ("config.json", "generation_config.json")


def has_tokenizer(shard: ShardFile) -> bool:
    """Whether an adapter has companions that set the behaviour of the fine-tuned model.

    Args:
        shard: the adapter's file.
    """
    names = (*_TOKENIZERS, "chat_template.jinja")
    return any(companion_path(shard.path.parent, name) is not None for name in names)


def adapted_folder(adapter: ShardFile, base: Path, resized: tuple[int, int] | None) -> Path:
    """A folder with base's companions, and the adapter's over them.

    Args:
        adapter: the adapter's file.
        base: base's folder.
        resized: the numbers of rows of base's embedding and of the adapted one, if they differ.

    Returns:
        A temporary folder, which is removed at the end of the process, or after a kill by the
        next one.

    Raises:
        OutputError: if it cannot be created.
    """
    own, made = adapter.path.parent, Path(mkdtemp(dir=_scratch()))
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
    if resized is not None:
        _resize(made / "config.json", *resized)
    return made


@cache
def _scratch() -> Path:
    """The temporary folder of this process: one, since each keeps a file open."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch_folder(None))


def _resize(path: Path, before: int, after: int) -> None:
    """Set the vocabulary's size in a config."""
    config = read_object(path)
    raw = path.read_bytes()
    sizes = {
        where: after for where in paths_to("vocab_size", config) if _value(config, where) == before
    }
    path.write_bytes(edit_json(raw, sizes))


def _value(document: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        document = document[key]
    return document
