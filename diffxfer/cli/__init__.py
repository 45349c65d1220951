"""Commands. They parse, call the library and print."""
