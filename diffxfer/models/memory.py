"""The memory that models in this process take: freeing it, and recognising that it ran out."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")


def free_memory() -> None:
    """Free the memory of models that nothing refers to any more."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def return_memory() -> None:
    """Give memory that is free back to the system; `malloc` keeps much of it for later."""
    free_memory()
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether a failure of PyTorch or its libraries means that memory ran out.

    Args:
        exc: the failure.
    """
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return True
    return isinstance(exc, RuntimeError) and any(text in str(exc).lower() for text in _TEXTS)
