"""Floor 1: a plan of chunks, run in bounded memory."""
