"""Buffers and stacks beside pages that nobody may touch: one byte too far and the processor says so."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any, Final

import numpy as np

ALIGNMENT: Final = 16  # of vector loads; a buffer's end is this close to the forbidden page
ZONE_BYTES: Final = 16 << 20  # address space kept free on each side; costs no memory
CANARY: Final = 0xC5
FIBERS: Final = 1024  # AWQ_MAX_THREADS of awq_simt.h
STACK_BYTES: Final = 256 * 1024  # AWQ_STACK_BYTES of awq_simt.h
_kept: list[mmap.mmap] = []
_PROT_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


class GuardedBuffer:
    """A copy of an array that ends (`at_end`) or starts at a forbidden page."""

    def __init__(self, source: np.ndarray[Any, Any], *, at_end: bool) -> None:
        self._like = source
        self._bytes = source.nbytes
        page = mmap.PAGESIZE
        body = -(-max(1, source.nbytes) // page) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(-1, body + 2 * ZONE_BYTES, flags, _READ_WRITE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        _protect(start, ZONE_BYTES)
        _protect(start + ZONE_BYTES + body, ZONE_BYTES)
        self._body = np.frombuffer(self._map, np.uint8, body, ZONE_BYTES)
        self._body[...] = CANARY
        self._at = body - -(-source.nbytes // ALIGNMENT) * ALIGNMENT if at_end else 0
        self._body[self._at : self._at + self._bytes] = np.ravel(source).view(np.uint8)
        self._zones = (start, start + body + 2 * ZONE_BYTES)
        self.address = start + ZONE_BYTES + self._at

    def array(self) -> np.ndarray[Any, Any]:
        """What the buffer holds now."""
        data: np.ndarray[Any, Any] = self._body[self._at : self._at + self._bytes].view(self._like.dtype)
        return data.reshape(self._like.shape)

    def stray(self) -> str | None:
        """`before` or `behind` when something was written beside the buffer on its own page."""
        if (self._body[: self._at] != CANARY).any():
            return "before"
        return "behind" if (self._body[self._at + self._bytes :] != CANARY).any() else None

    def position(self, address: int) -> str | None:
        """Where a faulting address lies, in words; None when it is nowhere near."""
        if not self._zones[0] <= address < self._zones[1]:
            return None
        if address < self.address:
            return f"{self.address - address} bytes before the start of"
        behind = address - self.address - self._bytes
        return f"{behind} bytes behind the end of" if behind >= 0 else "within"


@cache
def fiber_stacks() -> int:
    """Address of the stacks of all fibres, for the life of the process: kernels share them, one launch at a time."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, FIBERS * STACK_BYTES, flags, _READ_WRITE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for i in range(FIBERS):
        _protect(start + i * STACK_BYTES, mmap.PAGESIZE)
    _kept.append(memory)
    return start


def _protect(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, size, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect failed")
