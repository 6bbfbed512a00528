"""tvm, imported without torch: running a library needs none, and torch costs seconds and 200 MB.

tvm_ffi imports torch where it is installed, to convert its tensors. Here it finds none, unless torch was
imported before; torch itself can be imported afterwards as ever.
"""

from __future__ import annotations

import sys

_hide_torch = not {"torch", "tvm_ffi"} & sys.modules.keys()
if _hide_torch:
    sys.modules["torch"] = None  # type: ignore[assignment]
try:
    import tvm
    from tvm_ffi import Shape
finally:
    if _hide_torch:
        del sys.modules["torch"]

__all__ = ["Shape", "tvm"]
