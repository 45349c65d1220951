"""Floor 3: what models score, and how they compare; lm-eval does the scoring."""
