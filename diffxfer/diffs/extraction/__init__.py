"""Extracting: Δ = finetuned − base, as an artifact."""
