"""Runs what was emitted: kernels of a library against a reference, on whatever this machine has."""
