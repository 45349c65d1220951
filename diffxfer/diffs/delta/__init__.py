"""Where Δ comes from: two checkpoints, or a diff vector on disk."""
