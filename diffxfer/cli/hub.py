"""Messages about models on the Hub."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from diffxfer.checkpoints.output_place import gigabytes
from diffxfer.checkpoints.resolve import find_id

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def tell_of_hub(say: Callable[[str], None], *named: Path | str | None) -> None:
    """Print, for every model that is not a local folder, that it is taken from the Hub.

    Args:
        say: called with each line.
        named: the models as the user gave them; None for one that was not given.
    """
    for name in dict.fromkeys(str(name) for name in named if name is not None):
        if find_id(name, "a model") is None:
            continue
        from huggingface_hub import constants
        from huggingface_hub.utils.logging import set_verbosity

        if not {"DIFFXFER_DEBUG", "HF_HUB_VERBOSITY"} & os.environ.keys():
            # huggingface_hub logs every retry; diffxfer reports the outcome in one line.
            set_verbosity(logging.ERROR)
        say(f"{name}: no such folder, so it is taken from the Hub, {constants.ENDPOINT}")


def downloads(count: int, *, done: bool) -> list[str]:
    """A line about the download, or none if nothing is downloaded.

    Args:
        count: number of bytes.
        done: whether the download is done.
    """
    if not count:
        return []
    return [f"{'downloaded' if done else 'would download'} {gigabytes(count)} into the Hub's cache"]
