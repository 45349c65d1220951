"""Importing the scripts in `examples/`, which are no package."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def import_example(folder: str, module: str) -> Any:
    """Import a script as Python does that runs it: its folder and `examples/` are in the path.

    Args:
        folder: in `examples/`.
        module: the script's name, without its suffix.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str(EXAMPLES / folder))
        return import_module(module)
