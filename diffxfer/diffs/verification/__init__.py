"""Verifying what diffxfer wrote, and proving that base + Δ is finetuned."""
