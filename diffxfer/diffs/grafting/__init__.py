"""Grafting: target + α·Δ, from the options to the tasks."""
