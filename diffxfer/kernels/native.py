"""Loading compiled kernels, and calling them.

A call releases Python's lock. Addresses are not checked: the caller owns the buffers.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm

from diffxfer.kernels.cache import find, keep
from diffxfer.kernels.notices import tell
from diffxfer.kernels.processor import description, this_processor
from diffxfer.kernels.signatures import ENTRY, KERNELS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Kernel = Callable[..., int]

_ARGUMENTS: Mapping[str, Any] = {
    "count": ctypes.c_int64,
    "alpha": ctypes.c_double,
    "array": ctypes.c_void_p,
}
_lock = threading.Lock()
_loaded: dict[tuple[str, tuple[str, ...]], Kernel] = {}
_engines: list[llvm.ExecutionEngine] = []


def kernel(name: str, dtypes: tuple[str, ...]) -> Kernel:
    """Load a kernel for given dtypes; compile it first if it is not in the cache.

    Args:
        name: one of `KERNELS`.
        dtypes: the dtypes of its first arguments, which are pointers to elements.

    Returns:
        A C function that takes addresses and numbers, and returns an integer.
    """
    found = _loaded.get((name, dtypes))
    if found is None:
        with _lock:
            found = _loaded.get((name, dtypes))
            if found is None:
                found = _loaded[name, dtypes] = _load(name, dtypes)
    return found


def _load(name: str, dtypes: tuple[str, ...]) -> Kernel:
    processor = description()
    file = "-".join((name, *dtypes)) + ".o"
    code = find(file, processor)
    if code is None:
        code = _compile(name, dtypes)
        failure = keep(file, processor, code)
        if failure is not None and os.environ.get("DIFFXFER_DEBUG") == "1":
            tell(f"compiled code is kept in memory only, since it cannot be written ({failure})")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), this_processor())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # the code lives as long as it does
    types = [*["array"] * len(dtypes), *KERNELS[name]]
    form = ctypes.CFUNCTYPE(ctypes.c_int64, *(_ARGUMENTS[kind] for kind in types))
    made: Kernel = form(engine.get_function_address(ENTRY))
    return made


def _compile(name: str, dtypes: tuple[str, ...]) -> bytes:
    tell("compiling the arithmetic (on the first run only)")
    from diffxfer.kernels.compiling import compile_kernel

    return compile_kernel(name, dtypes)
