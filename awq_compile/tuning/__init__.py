"""Measured schedules: where they are kept, and how the compiler finds them."""
