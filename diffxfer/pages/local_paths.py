"""Local paths in texts, which a page that is shared should not have."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import gettempdir

_ABSOLUTE = re.compile(
    r"(?<![\w.:/…~}-])(?:~[\w.-]*)?(?:/[^\s/'\"<>,;:()]+)+/([^\s/'\"<>,;:()]+)/?"
)
"""An absolute path in a text; the group is its last component."""


def without_folders(text: str, run: Path, home: Path | None) -> str:
    """Shorten local paths in a text.

    Args:
        text: any text with paths in it; a path outside of the two folders keeps its last component.
        run: the folder of the run; paths in it become relative to it.
        home: the folder of the recipe; paths in it become relative to it.
    """
    whole = Path(text)
    for folder in (run, home):
        if folder is not None and folder.is_absolute():
            text = text.replace(f"{folder}/", "").replace(str(folder), folder.name)
    if whole.is_absolute() and text == str(whole) and "\n" not in text:
        return f"…/{whole.name}"  # a path with spaces does not match the pattern
    for folder in (Path.home(), Path(gettempdir())):
        if len(folder.parts) > 1:
            text = text.replace(f"{folder}/", "…/")
    return _ABSOLUTE.sub(r"…/\1", text)
