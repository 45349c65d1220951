"""Compiling a kernel for given dtypes. Imports numba, so it is imported only on a cache miss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm
from numba import cfunc, types

from diffxfer.kernels import decoding, distance_loops, encoding, loops, packing, rounding
from diffxfer.kernels.dtypes import TYPES
from diffxfer.kernels.processor import this_processor
from diffxfer.kernels.signatures import ENTRY, KERNELS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NUMBERS = {"count": types.int64, "alpha": types.float64, "array": types.CPointer(types.float64)}


def compile_kernel(name: str, dtypes: Sequence[str]) -> bytes:
    """Compile a kernel to an object file for this processor; its function is named `ENTRY`.

    Args:
        name: one of `KERNELS`.
        dtypes: the dtypes of its first arguments, which are pointers.
    """
    code: bytes = this_processor().emit_object(optimize(name, dtypes))
    return code


def optimize(name: str, dtypes: Sequence[str]) -> llvm.ModuleRef:
    """Compile a kernel to optimised LLVM code that needs only the C library.

    Args:
        name: one of `KERNELS`.
        dtypes: the dtypes of its first arguments, which are pointers.
    """
    rest = [_NUMBERS[kind] for kind in KERNELS[name]]
    pointers = [types.CPointer(TYPES[dtype]) for dtype in dtypes]
    # numpy's error model: a division by zero raises nothing.
    made = cfunc(types.int64(*pointers, *rest), error_model="numpy")(_function(name))
    module = llvm.parse_assembly(made.inspect_llvm())
    for function in module.functions:
        if function.name == made.native_name:
            function.name = ENTRY
        elif not function.is_declaration:
            function.linkage = "internal"
            function.add_function_attribute("alwaysinline")
    # Optimise again: only now does LLVM see that the loop cannot raise, and drops the error path.
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(this_processor(), tuning)
    passes.getModulePassManager().run(module, passes)
    needed = [f.name for f in module.functions if f.is_declaration]
    assert all(each.startswith("llvm.") for each in needed), f"{name} needs {needed}"
    return module


def _function(name: str) -> Callable[..., Any]:
    modules = (loops, distance_loops, decoding, encoding, packing, rounding)
    found: Callable[..., Any] = next(vars(m)[name] for m in modules if name in vars(m))
    return found
