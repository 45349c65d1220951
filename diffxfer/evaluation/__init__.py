"""Floor 3: scoring models with lm-eval and comparing their scores."""
