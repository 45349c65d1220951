"""Floor 1: HTML pages, one self-contained file each, with tables and plots; the page loads nothing."""
