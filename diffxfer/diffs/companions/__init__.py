"""The companions of a graft, made from those of the target and of finetuned."""
