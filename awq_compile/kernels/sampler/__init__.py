"""What a sampler does on a GPU: sorts, draws, cuts and verifies, right for any order of the threads."""
