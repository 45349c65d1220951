"""Recycling a diff vector: training its graft further, and chains of rounds."""
