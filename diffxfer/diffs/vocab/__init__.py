"""Tokens: pairing the rows of embeddings and heads between roles."""
