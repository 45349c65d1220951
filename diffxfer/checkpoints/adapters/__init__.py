"""LoRA adapters as PEFT saves them: their config, and the tensors that they change."""
