"""A device behind a TVM RPC server, as `timing.Device`: kernels are built here, and run and timed there.

As a program, the worker of one connection: `python -m awq_compile.tuning.rpc_device tracker|server HOST:PORT KEY
[FOLDER]`, where a tracker is asked for a free device of that key, and libraries that lie in FOLDER are not built here.

A connection that is lost ends this process with exit status `LOST`, as a crash of a local device ends its worker.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from awq_compile.errors import EnvironmentMissingError
from awq_compile.runtime.lean_tvm import tvm
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.roofs import Roof, nominal_roof
from awq_compile.tuning.export import export_kernel, kernel_suffix, library_name
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.inputs import Inputs
from awq_compile.tuning.measure import Work
from awq_compile.tuning.runtime_device import RuntimeKernel, identify
from awq_compile.tuning.timing import Kernel
from awq_compile.tuning.tracker import Address, Tracker

LOST: Final = 75  # EX_TEMPFAIL
_FREE_SECONDS: Final = 5.0  # in which a server that ended a session offers its device again
_SESSION_SECONDS: Final = 3600  # after which a server frees a device whose kernel hangs


class RpcDevice:
    """`match` opens the server, `where` is its address, `key` the kind of device, and `built` a folder of libraries.

    Times are those of TVM's time evaluator on the server. W lies there once: before a cold run the caches are
    flushed.
    """

    copies: int = 1

    def __init__(self, spec: TargetSpec, server: Address, match: str, key: str, built: Path | None = None) -> None:
        self.spec, self.where, self.built = spec, str(server), built
        self._suffix = kernel_suffix(spec)
        try:
            self.session = tvm.rpc.connect(server.host, server.port, match, _SESSION_SECONDS)
            kind = str(spec.tvm_target["kind"])
            self.device = self.session.device("cpu" if kind == "llvm" else kind, 0)
            if not self.device.exist:
                raise EnvironmentMissingError(f"the server at {server} has no {kind} device, which {spec.name} needs")
            self.fingerprint = self._identify(kind, key)
        except (RuntimeError, OSError) as error:
            raise EnvironmentMissingError(f"the RPC server at {server} does not answer: {error!s:.200}") from None
        self._inputs: Inputs | None = None
        self._arguments: list[Any] = []
        self._loaded = 0

    def roof(self) -> Roof:
        """See `Device`: by the data sheet."""
        return nominal_roof(self.spec.name)

    def prepare(self, inputs: Inputs) -> None:
        """See `Device`."""
        self._arguments = []  # the last work's go before the next ones come
        self._inputs = inputs
        try:
            arrays = [inputs.x, *inputs.weight, *inputs.extra, inputs.output()]
            self._arguments = [tvm.runtime.tensor(array, self.device) for array in arrays]
        except Exception:
            self.check()
            raise

    def load(self, work: Work, candidate: Candidate) -> Kernel:
        """See `Device`."""
        assert self._inputs is not None and self._inputs.work == work, work
        self._loaded += 1
        name = f"kernel{self._loaded}{self._suffix}"
        with tempfile.TemporaryDirectory(prefix="awq-rpc-") as folder:
            path = (self.built or Path(folder)) / library_name(work, candidate, self._suffix)
            if not path.exists():
                export_kernel(work, candidate, self.spec, path := Path(folder) / name)
            try:
                self.session.upload(str(path), name)
                module = self.session.load_module(name)
                self.session.remove(name)
            except Exception:
                self.check()
                raise
        return RuntimeKernel(self, module, self._inputs, self._arguments)

    def check(self) -> None:
        """Ends this process if the device does not answer any more."""
        try:
            tvm.runtime.tensor(np.zeros(1, "float32"), self.device).numpy()
        except Exception as error:
            _lost(f"the device at {self.where} is gone: {error!s:.200}")

    def _identify(self, kind: str, key: str) -> Fingerprint:
        if kind == "llvm":
            threads = int(self.session.get_function("runtime.NumThreads")())
            return Fingerprint(key or self.where, "cpu", f"{self.spec.machine}, {threads} threads over RPC", threads)
        return identify(self.device, kind, key or self.where)


def free_server(address: Address, key: str) -> tuple[Address, str]:
    """(a server of `key` that the tracker reserves for us, the word that opens it)."""
    end = time.monotonic() + _FREE_SECONDS
    tracker = Tracker(address)
    while not tracker.free(key):
        if time.monotonic() > end:
            raise EnvironmentMissingError(f"the tracker at {address} has no free device with the key {key!r}")
        time.sleep(0.2)
    return tracker.request(key)


def _lost(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(LOST)  # the client's destructors would wait for the server


def main() -> None:
    """The worker of one connection."""
    import tvm.rpc  # noqa: F401 - `tvm.rpc` above; needs tornado and cloudpickle, so not at import time

    from awq_compile.tuning.worker import serve

    kind, address, key = sys.argv[1], Address.parse(sys.argv[2]), sys.argv[3]
    built = Path(sys.argv[4]) if len(sys.argv) > 4 else None

    def open_device(spec: TargetSpec) -> RpcDevice:
        server, word = free_server(address, key) if kind == "tracker" else (address, key)
        return RpcDevice(spec, server, word, key, built)

    serve(open_device)


if __name__ == "__main__":
    main()
