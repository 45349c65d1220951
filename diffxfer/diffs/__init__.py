"""Diff vectors: extracting them, grafting them and verifying the results."""
