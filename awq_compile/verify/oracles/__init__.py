"""What kernels must compute, in float64 NumPy, with bounds on how far they may be from it."""
