"""What a graft's companions take from the target and from finetuned."""
