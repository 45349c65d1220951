"""Floor 2: diff vectors: extracting them, grafting them and verifying the results."""
