"""The arithmetic on a CPU, compiled: one pass over memory for each operation.

`encodings` reads and writes an element of a dtype, `loops` has the operations, `compiling` turns
one of them into machine code for some dtypes, `cache` keeps that, and `native` loads and calls it.
Only `native` and `cache` are imported where a kernel is cached: that takes 5 ms and llvmlite, where
numba takes 0.5 s and 100 MB.
"""
