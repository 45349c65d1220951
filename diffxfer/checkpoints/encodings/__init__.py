"""Encodings: ways to store a tensor other than as a plain array, one module each."""
