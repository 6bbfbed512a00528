"""One module per way to run device kernels on this machine; `base` says what they share."""
