"""The child process that holds the OpenCL driver: requests on stdin, answers on stdout.

A message is a u32 length, a JSON header with `sizes`, and that many byte strings.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import warnings
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

ZONE_BYTES: Final = 4096  # watched, on both sides of a buffer; a multiple of every device's base alignment
CANARY: Final = 0xC5


def canary(number: int) -> int:
    """Each buffer's own: a kernel that copies from behind one buffer to behind another must be seen."""
    return (CANARY + 37 * number) % 256


def send(pipe: Any, header: dict[str, Any], blobs: Sequence[Any]) -> None:
    """Writes one message."""
    text = json.dumps({**header, "sizes": [len(b) for b in blobs]}).encode()
    pipe.write(struct.pack("<I", len(text)) + text)
    for blob in blobs:
        pipe.write(blob)
    pipe.flush()


def receive(pipe: Any) -> tuple[dict[str, Any], list[bytes]]:
    """Reads one message. Raises `EOFError` when the other side is gone."""

    def exactly(count: int) -> bytes:
        data = pipe.read(count)
        if len(data) != count:
            raise EOFError
        return bytes(data)

    header = json.loads(exactly(struct.unpack("<I", exactly(4))[0]))
    return header, [exactly(size) for size in header.pop("sizes")]


class Worker:
    """One device, and the kernels compiled for it."""

    def __init__(self, prefer: str) -> None:
        import pyopencl as cl

        devices = [d for p in cl.get_platforms() for d in p.get_devices()]
        if not devices:
            raise RuntimeError("no driver offers a device")
        kinds = {"gpu": cl.device_type.GPU, "cpu": cl.device_type.CPU}
        devices.sort(key=lambda d: not d.type & kinds[prefer])
        self.cl = cl
        self.device = devices[0]
        self.context = cl.Context([self.device])
        self.queue = cl.CommandQueue(self.context)
        self.kernels: dict[tuple[str, str], Any] = {}

    def kernel(self, name: str, source: str) -> Any:
        """The compiled kernel. Raises `CompilationError` with the driver's words."""
        if (name, source) not in self.kernels:
            program = self.cl.Program(self.context, source).build()
            self.kernels[name, source] = self.cl.Kernel(program, name)
        return self.kernels[name, source]

    def launch(self, request: dict[str, Any], blobs: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        """Runs a kernel on copies of the blobs and returns them, or says what went wrong."""
        import numpy as np

        cl = self.cl
        try:
            kernel = self.kernel(request["kernel"], request["source"])
        except cl.RuntimeError as error:
            return {"error": f"does not compile: {str(error)[:3000]}", "compile": True}, []
        if kernel.num_args != len(blobs) + len(request["scalars"]):
            given = f"{len(blobs)} buffers and {len(request['scalars'])} scalars"
            return {"error": f"takes {kernel.num_args} arguments, and was given {given}"}, []
        flags, whole = cl.mem_flags, []
        for number, blob in enumerate(blobs):
            padded = -(-max(1, len(blob)) // 128) * 128
            host = np.full(padded + 2 * ZONE_BYTES, canary(number), np.uint8)
            host[ZONE_BYTES : ZONE_BYTES + len(blob)] = np.frombuffer(blob, np.uint8)
            buffer = cl.Buffer(self.context, flags.READ_WRITE | flags.COPY_HOST_PTR, hostbuf=host)
            region = buffer.get_sub_region(ZONE_BYTES, padded)
            kernel.set_arg(number, region)
            whole.append((buffer, host, region))  # an argument does not keep its region alive
        for i, scalar in enumerate(request["scalars"]):
            kernel.set_arg(len(blobs) + i, np.dtype(request["types"][i]).type(scalar))
        try:
            cl.enqueue_nd_range_kernel(self.queue, kernel, request["global"], request["local"])
            self.queue.finish()
        except cl.RuntimeError as error:
            return {"error": f"cannot run with blocks of {request['local']} threads: {error}"}, []
        results = []
        for number, (blob, (buffer, host, _)) in enumerate(zip(blobs, whole, strict=True)):
            cl.enqueue_copy(self.queue, host, buffer)
            end = ZONE_BYTES + len(blob)
            for where, zone in (("before", host[:ZONE_BYTES]), ("behind", host[end:])):
                if (zone != canary(number)).any():
                    return {"error": f"writes {where} buffer {number} of {len(blob)} bytes"}, []
            results.append(host[ZONE_BYTES:end].tobytes())
        return {"done": True}, results


def main() -> None:
    """Serves until stdin closes. What the driver prints goes to stderr."""
    answers: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # drivers remark on every compilation
    worker: Worker | None = None
    while True:
        try:
            request, blobs = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if request["do"] == "open":
                worker = Worker(request["prefer"])
                send(answers, {"device": worker.device.name}, [])
            elif worker is not None:
                send(answers, *worker.launch(request, blobs))
        except Exception as error:  # a driver raises what it likes: the parent reports it
            send(answers, {"error": f"{type(error).__name__}: {error}"}, [])


if __name__ == "__main__":
    main()
