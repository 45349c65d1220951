"""Consistency of a model's files: config, tokenizer, templates, weights."""
