"""A device of this machine through TVM's own runtime, as `timing.Device`.

The wheel from PyPI has that of CUDA, and on a Mac that of Metal. Candidates are built and linked as for another
machine. W lies on the device once: before a cold run the caches are flushed.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from awq_compile.errors import EnvironmentMissingError
from awq_compile.runtime.lean_tvm import tvm
from awq_compile.targets.base import TargetSpec
from awq_compile.targets.roofs import Roof, nominal_roof
from awq_compile.tuning.candidate import KERNEL
from awq_compile.tuning.export import export_kernel, kernel_suffix
from awq_compile.tuning.fingerprint import Fingerprint
from awq_compile.tuning.foreign import Candidate
from awq_compile.tuning.inputs import Inputs
from awq_compile.tuning.measure import Work
from awq_compile.tuning.timing import Kernel

_FLUSH_BYTES: Final = 128 << 20  # copied before a cold run on a GPU: more than the caches of those of `targets.roofs`


class RuntimeDevice:
    """Device 0 of the target's kind. Raises `EnvironmentMissingError` where TVM's runtime has none."""

    copies: int = 1

    def __init__(self, spec: TargetSpec) -> None:
        self.spec = spec
        kind = str(spec.tvm_target["kind"])
        self.device, there = None, False
        with suppress(Exception):  # a runtime without the kind raises what it likes
            self.device = tvm.runtime.device("cpu" if kind == "llvm" else kind, 0)
            there = bool(self.device.exist)
        if not there:
            raise EnvironmentMissingError(
                f"nothing on this machine runs and times kernels for {spec.name}: TVM's runtime finds no {kind} device",
                hint="measure on a machine that has the device, over RPC or by a bundle: awq-compile tune --help",
            )
        self._suffix = kernel_suffix(spec)
        self.fingerprint = identify(self.device, kind, kind)
        self._inputs: Inputs | None = None
        self._arguments: list[Any] = []

    def roof(self) -> Roof:
        """See `Device`: by the data sheet."""
        return nominal_roof(self.spec.name)

    def prepare(self, inputs: Inputs) -> None:
        """See `Device`."""
        self._arguments = []  # the last work's go before the next ones come
        self._inputs = inputs
        arrays = [inputs.x, *inputs.weight, *inputs.extra, inputs.output()]
        self._arguments = [tvm.runtime.tensor(array, self.device) for array in arrays]

    def load(self, work: Work, candidate: Candidate) -> Kernel:
        """See `Device`."""
        assert self._inputs is not None and self._inputs.work == work, work
        with tempfile.TemporaryDirectory(prefix="awq-tune-") as folder:
            path = Path(folder) / f"kernel{self._suffix}"
            export_kernel(work, candidate, self.spec, path)
            module = tvm.runtime.load_module(str(path))
        return RuntimeKernel(self, module, self._inputs, self._arguments)

    def check(self) -> None:
        """Says nothing: what breaks this device ends the process, or is raised."""


class _OnDevice(Protocol):
    """`device` is TVM's; `check` is asked when something was raised, and may end the process."""

    device: Any
    fingerprint: Fingerprint

    def check(self) -> None: ...


@dataclass
class RuntimeKernel:
    """See `Kernel`; times are those of TVM's time evaluator, which runs once unmeasured before it measures."""

    where: _OnDevice
    module: Any
    inputs: Inputs
    arguments: list[Any]

    def poison(self) -> None:
        """See `Kernel`."""
        try:
            self.arguments[-1].copyfrom(self.inputs.output())
        except Exception:
            self.where.check()
            raise

    def run(self, copy: int, *, cold: bool) -> float:
        """See `Kernel`."""
        cpu = self.where.fingerprint.kind == "cpu"
        flush = _FLUSH_BYTES if cold and not cpu else 0
        before = "cache_flush_cpu_non_first_arg" if cold and cpu else ""
        try:
            evaluator = self.module.time_evaluator(
                KERNEL, self.where.device, number=1, repeat=1, cache_flush_bytes=flush, f_preproc=before
            )
            return float(evaluator(*self.arguments).results[0])
        except Exception:
            self.where.check()
            raise

    def wrong(self) -> str:
        """See `Kernel`."""
        try:
            y, x = self.arguments[-1].numpy(), self.arguments[0].numpy()
        except Exception:
            self.where.check()
            raise
        return self.inputs.wrong(y, x)


def identify(device: Any, kind: str, otherwise: str) -> Fingerprint:
    """What TVM's runtime says of a device; not every one tells its name (then `otherwise`) or its multiprocessors."""
    units = 0
    with suppress(Exception):
        units = int(device.multi_processor_count or 0)
    name = None
    with suppress(Exception):
        name = device.device_name
    return Fingerprint(str(name or otherwise), "cpu" if kind == "llvm" else "gpu", f"TVM {kind}", units)
