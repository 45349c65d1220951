"""Floor 2: what is subtracted from what, and added to what."""
