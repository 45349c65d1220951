"""Floor 0: checkpoints on disk and on the Hub: reading and writing them."""
