"""The engine: scheduling, paging and streams in plain Python and numpy; no JAX below here."""
