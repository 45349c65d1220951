"""Tokens: which row of an embedding or head belongs to which, role by role."""
