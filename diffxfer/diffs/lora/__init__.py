"""LoRA adapters that diffxfer writes: a Δ approximated by factors of low rank."""
