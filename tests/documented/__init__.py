"""The commands that the documentation shows, run on tiny models."""
