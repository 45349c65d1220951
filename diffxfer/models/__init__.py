"""Models in memory: grafts and mixtures of two models, with the bits that would be on disk."""
