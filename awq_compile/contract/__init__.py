"""What the MLC runtime demands of a model library and its directory, and a checker that runs neither."""
