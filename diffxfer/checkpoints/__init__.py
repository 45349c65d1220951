"""Floor 0: what is on disk, and how it is read and written."""
