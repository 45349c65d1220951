"""Which tensor of which role belongs to which, and what the user chose of them."""
