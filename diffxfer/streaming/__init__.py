"""Floor 1: running a plan chunk by chunk in bounded memory."""
