"""Probing: whether a graft will work, and why."""
