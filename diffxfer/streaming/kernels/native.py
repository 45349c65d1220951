"""Loading compiled kernels, and calling them.

A call lets go of Python's lock. Addresses are not checked: whoever calls owns the buffers.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm

from diffxfer.streaming.kernels.cache import find, keep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Kernel = Callable[..., int]

KERNELS: Mapping[str, tuple[str, ...]] = {
    "transfer": ("count", "alpha"),
    "apply": ("count", "alpha"),
    "convert": ("count",),
    "check": ("count",),
    "subtract": ("count", "array", "array"),
    "contrast": ("count", "array", "array"),
    "restore": ("count",),
    "give_back": ("count",),
    "equal": ("count",),
}
"""The functions of `loops`, and what each takes after its pointers to elements."""

ENTRY = "diffxfer_kernel"
SCRATCH = 3 * 256
"""How many float64 the first array of a kernel that sums has."""
TOTALS = 4
"""How many float64 the second one has."""

_ARGUMENTS: Mapping[str, Any] = {
    "count": ctypes.c_int64,
    "alpha": ctypes.c_double,
    "array": ctypes.c_void_p,
}
_lock = threading.Lock()
_loaded: dict[tuple[str, tuple[str, ...]], Kernel] = {}
_engines: list[llvm.ExecutionEngine] = []
_told: set[str] = set()


def kernel(name: str, dtypes: tuple[str, ...]) -> Kernel:
    """A kernel for some dtypes: loaded, and compiled before if no run has done so yet.

    Args:
        name: one of `KERNELS`.
        dtypes: of the pointers to elements that it takes first.

    Returns:
        What takes addresses and numbers, and gives a number.
    """
    found = _loaded.get((name, dtypes))
    if found is None:
        with _lock:
            found = _loaded.get((name, dtypes))
            if found is None:
                found = _loaded[name, dtypes] = _load(name, dtypes)
    return found


def _load(name: str, dtypes: tuple[str, ...]) -> Kernel:
    processor = _processor()
    file = "-".join((name, *dtypes)) + ".o"
    code = find(file, processor)
    if code is None:
        code = _compile(name, dtypes)
        failure = keep(file, processor, code)
        if failure is not None and os.environ.get("DIFFXFER_DEBUG") == "1":
            _tell(f"compiled code is kept in memory alone, as it cannot be written ({failure})")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), this_processor())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # the code lives as long as it does
    types = [*["array"] * len(dtypes), *KERNELS[name]]
    form = ctypes.CFUNCTYPE(ctypes.c_int64, *(_ARGUMENTS[kind] for kind in types))
    made: Kernel = form(engine.get_function_address(ENTRY))
    return made


def _compile(name: str, dtypes: tuple[str, ...]) -> bytes:
    if sys.stderr is not None and sys.stderr.isatty():
        _tell("compiling, once")
    from diffxfer.streaming.kernels.compiling import compile_kernel

    return compile_kernel(name, dtypes)


def _tell(line: str) -> None:
    if line not in _told:
        _told.add(line)
        print(line, file=sys.stderr)


@cache
def this_processor() -> llvm.TargetMachine:
    """What compiles for the processor that this runs on."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = _model()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features, opt=3, codemodel="jitdefault")


def _processor() -> str:
    return " ".join((llvm.get_default_triple(), *_model()))


@cache
def _model() -> tuple[str, str]:
    name, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES", "")
    if name is None:  # else as numba is told: such as one model for all nodes of a cluster
        name = llvm.get_host_cpu_name()
        with suppress(RuntimeError):  # not known of every processor
            features = llvm.get_host_cpu_features().flatten()
    return name, features


class _DefaultSettings:
    """The processor's settings that C begins with: to nearest, and subnormals are computed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._settings = ctypes.c_void_p(-1)  # FE_DFL_ENV of glibc and musl
        if sys.platform == "darwin":
            there = ctypes.c_byte.in_dll(self._library, "_FE_DFL_ENV")
            self._settings = ctypes.c_void_p(ctypes.addressof(there))

    def take(self) -> None:
        self._library.fesetenv(self._settings)


def use_default_settings() -> None:
    """Compute in this thread as C does, whatever the thread that started it had set."""
    _default_settings().take()


@cache
def _default_settings() -> _DefaultSettings:
    return _DefaultSettings()
