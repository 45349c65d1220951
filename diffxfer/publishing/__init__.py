"""Publishing: folders that we wrote, on the Hub, with a complete card."""
