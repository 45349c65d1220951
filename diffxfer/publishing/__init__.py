"""Floor 4: publishing diff vectors, grafts and tuned models on the Hub, with model cards."""
