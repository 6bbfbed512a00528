"""`TargetSpec`: one page of data about a device, and the table of presets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetSpec:
    """What the compiler knows of a target.

    `name` is what the user types (`cpu`, `cpu:aarch64-linux-gnu`). `tvm_target` is the argument of
    `tvm.target.Target` as JSON-like data. `library_suffix` is `.so`, `.dylib`, `.dll` or `.tar`.
    """

    name: str
    tvm_target: dict[str, object]
    library_suffix: str
