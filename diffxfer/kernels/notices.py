"""Notices of slow work, such as compiling; a command that wants to print them listens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_listeners: list[Callable[[str], None]] = []
_told: set[str] = set()


def listen(listener: Callable[[str], None] | None) -> None:
    """Set the listener.

    Args:
        listener: receives each notice once; None for no listener.
    """
    _listeners[:] = [] if listener is None else [listener]
    _told.clear()


def tell(notice: str) -> None:
    """Give a notice to the listener, if there is one and it has not had it yet.

    Args:
        notice: one line.
    """
    if notice not in _told:
        _told.add(notice)
        for listener in _listeners:
            listener(notice)
