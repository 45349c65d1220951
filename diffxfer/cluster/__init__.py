"""Work on a Ray cluster. Only this package imports Ray, and only when a cluster is asked for."""
