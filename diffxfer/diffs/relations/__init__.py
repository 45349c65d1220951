"""Whether models belong together, by a few thousand sampled weights."""
