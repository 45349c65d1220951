"""Further training of a model, and chains that recycle a diff vector over new bases."""
