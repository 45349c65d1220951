"""Floor 5: commands. They parse, call the library and print."""
