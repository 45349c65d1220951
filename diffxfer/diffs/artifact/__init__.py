"""What a folder that we write holds beside weights and companions."""
