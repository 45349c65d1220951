"""Scoring models with lm-eval and comparing their scores."""
