"""The files that diffxfer adds to weights and companions in a folder that it writes."""
