"""Publishing diff vectors, grafts and tuned models on the Hub, with model cards."""
