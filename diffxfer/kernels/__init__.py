"""Compiled arithmetic for the CPU: one pass over memory for each operation.

`dtypes` reads and writes an element of a dtype, `loops` and `distance_loops` contain the
operations, and `lanes` what those that sum share; `decoding` and `encoding` are of quantised
weights. `compiling` turns an operation into machine code
for given dtypes, `cache` stores the code on disk, and `native` loads and calls it.
Only `native` and `cache` are imported where a kernel is cached: that takes 5 ms and llvmlite, where
numba takes 0.5 s and 100 MB.
"""
