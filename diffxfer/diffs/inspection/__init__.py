"""Floor 2: what a checkpoint or a diff vector is, and how two checkpoints differ."""
