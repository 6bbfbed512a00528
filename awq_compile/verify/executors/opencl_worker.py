"""The child process that holds the OpenCL driver: see `child`."""

from __future__ import annotations

import warnings
from typing import Any, Final

from awq_compile.verify.executors.child import Answer, serve

ZONE_BYTES: Final = 4096  # watched, on both sides of a buffer; a multiple of every device's base alignment
CANARY: Final = 0xC5


def canary(number: int) -> int:
    """Each buffer's own: a kernel that copies from behind one buffer to behind another must be seen."""
    return (CANARY + 37 * number) % 256


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

    def launch(self, request: dict[str, Any], blobs: list[bytes]) -> Answer:
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
    """Serves until stdin closes."""
    warnings.simplefilter("ignore")  # drivers remark on every compilation
    worker: Worker | None = None

    def answer(request: dict[str, Any], blobs: list[bytes]) -> Answer:
        nonlocal worker
        if request["do"] == "open":
            worker = Worker(request["prefer"])
            return {"device": worker.device.name}, []
        assert worker is not None
        return worker.launch(request, blobs)

    serve(answer)


if __name__ == "__main__":
    main()
