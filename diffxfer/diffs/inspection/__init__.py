"""Describing a checkpoint or a diff vector, and comparing two checkpoints."""
