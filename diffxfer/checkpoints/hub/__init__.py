"""Models on the Hub: what they are called, what is there, and how their bytes come here."""
