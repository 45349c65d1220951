"""Floor 1: self-contained HTML pages with tables and plots."""
