"""This processor: the target of the compiler, and its floating-point settings."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache

import llvmlite.binding as llvm

_ARM = ("aarch64", "arm64")


@cache
def this_processor() -> llvm.TargetMachine:
    """LLVM's target machine for this processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = _model()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features, opt=3, codemodel="jitdefault")


def description() -> str:
    """The platform and the processor that compiled code needs."""
    return " ".join((llvm.get_default_triple(), *_model()))


def converts_halves() -> bool:
    """Whether it has instructions that convert between float16 and float32."""
    _, features = _model()
    return "+f16c" in features.split(",") or llvm.get_default_triple().startswith(_ARM)


@cache
def _model() -> tuple[str, str]:
    name, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES", "")
    if name is None:  # NUMBA_CPU_NAME may name one model for all nodes of a mixed cluster
        name = llvm.get_host_cpu_name()
        with suppress(RuntimeError):  # LLVM does not know them for every processor
            features = llvm.get_host_cpu_features().flatten()
    return name, features


def use_default_settings() -> None:
    """Reset this thread's floating-point settings to C's defaults.

    That is: round to nearest, and keep subnormals. A thread inherits these settings from the thread
    that starts it.
    """
    library, settings = _default_settings()
    library.fesetenv(settings)


@cache
def _default_settings() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    library = ctypes.CDLL(None)
    if sys.platform == "darwin":
        there = ctypes.c_byte.in_dll(library, "_FE_DFL_ENV")
        return library, ctypes.c_void_p(ctypes.addressof(there))
    return library, ctypes.c_void_p(-1)  # FE_DFL_ENV of glibc and musl
