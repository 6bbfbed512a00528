"""What tests of the command line share."""

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]  # a command line in this process → (exit code, stdout, stderr)
