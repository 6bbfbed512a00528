"""Arguments to run a PrimFunc on, and what must come out."""
