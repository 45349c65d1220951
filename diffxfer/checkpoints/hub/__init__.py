"""Models on the Hub: names, file lists, downloads, reads by range and uploads."""
