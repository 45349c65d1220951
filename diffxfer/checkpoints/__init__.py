"""Checkpoints on disk and on the Hub: reading and writing them."""
