"""One matmul x Wᵀ with INT4 weights on this machine's GPU, by our kernels and by what else there is.

For `run_cuda_linears`. torch has the memory, the graphs and cuBLAS; CuPy launches machine code.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
import torch

from awq_compile.formats import QuantSpec
from awq_compile.problem import MatmulProblem, decode_problem
from awq_compile.verify.launch_table import kernels_of, run_prim_func

ROTATED_BYTES = 512 << 20  # of W, taken in turns: well over every L2
ROTATED_ROWS = 64  # up to which every run must find its W in memory; beyond, two copies do
STATIC_SHARED = 48 << 10  # more needs an opt-in

Call = Callable[[], Any]


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        *(("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint)),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint)),
    )


_GRAPH_SECONDS = 1e-3
_OVERLAPPING = _Attribute(6, 0, (1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def launch_early(function: Any, grid: Any, block: Any, values: Sequence[Any], shared_mem: int) -> None:
    """Launches a kernel of CuPy's on its current stream before the one ahead has ended, as TVM's runtime does."""
    numbers = [ctypes.c_int64(int(value)) for value in values]
    pointers = (ctypes.c_void_p * len(numbers))(*map(ctypes.addressof, numbers))
    stream = cp.cuda.get_current_stream().ptr
    config = _Config(tuple(grid), tuple(block), shared_mem, stream, ctypes.pointer(_OVERLAPPING), 1)
    handle = ctypes.c_void_p(function.kernel.ptr)
    if status := ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx(ctypes.byref(config), handle, pointers, None):
        raise RuntimeError(f"cuLaunchKernelEx: error {status}")


def launching(stream: Any) -> Any:
    """A context in which CuPy launches on a stream of torch's."""
    return cp.cuda.ExternalStream(stream.cuda_stream) if stream.cuda_stream else cp.cuda.Stream.null


def graph_seconds(calls: Sequence[Call], *, least: int = 5, most: int = 9, budget: float = 0.05) -> float:
    """Seconds of one call, in a CUDA graph of them all: the median of as many replays as fit the budget.

    A graph of calls that take less than a millisecond repeats them: its start is not to count.
    """
    stream = torch.cuda.Stream()

    def graph_of(rounds: int) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), launching(torch.cuda.current_stream()):
            for call in [*calls] * rounds:
                call()
        return graph

    def replayed(graph: Any) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    with torch.cuda.stream(stream):
        with launching(stream):
            for call in calls:
                call()
        stream.synchronize()
        graph = graph_of(1)
        replayed(graph)
        rounds = math.ceil(_GRAPH_SECONDS / replayed(graph))
        if rounds > 1:
            graph = graph_of(rounds)
            replayed(graph)
        times: list[float] = []
        while len(times) < least or (len(times) < most and sum(times) < budget):
            times.append(replayed(graph))
    return statistics.median(times) / (len(calls) * rounds)


def check_chain(linear: Linear, weights: Weights, *, rounds: int = 20, steps: int = 8) -> None:
    """Square matmuls each of which reads what the one before has written give the same early as in turn.

    Raises `ArithmeticError`. In a CUDA graph, over poisoned memory, one row.
    """
    x = torch.randn(1, linear.problem.k, device="cuda").half()
    found = []
    for in_turn in (True, False):
        rows = torch.empty(rounds, steps, 1, linear.problem.n, dtype=torch.float16, device="cuda")
        calls = [
            linear.call([row[i - 1] if i else x, *weights.packed[i % weights.copies], row[i]], in_turn=in_turn)
            for row in rows
            for i in range(steps)
        ]
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), launching(torch.cuda.current_stream()):
            for call in calls:
                call()
        rows.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        found.append(rows)
    if not torch.equal(*found):
        raise ArithmeticError("a kernel read what the one before it had not written yet")


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written. Not in a graph, where it is slower."""
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(8):
            b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 8e3)
    return 2 * (1 << 30) / statistics.median(times[1:])


@dataclass
class Recorder:
    """An `Executor` that launches nothing and keeps what it is told."""

    launches: list[tuple[str, list[Any], Any, Any, int]] = field(default_factory=list)

    def launch(self, kernel: str, args: Any, grid: Any, block: Any, *, dynamic_shared: int = 0) -> None:
        """See the protocol of `awq_compile.verify.executors.base`."""
        self.launches.append((kernel, list(args), tuple(grid), tuple(block), dynamic_shared))


@dataclass
class Linear:
    """One entry of a bundle: `by` whom, from how many rows on, and its machine code."""

    by: str
    first: int
    problem: MatmulProblem
    table: dict[str, Any]
    code: Path
    overlapping: frozenset[str] = frozenset()  # kernels that are launched before the one ahead has ended

    @staticmethod
    def read(folder: Path) -> list[Linear]:
        """All of a bundle."""
        entries = json.loads((folder / "linears.json").read_text())["linears"]
        return [
            Linear(
                *(e["by"], e["from"], decode_problem(e["problem"]), e["table"], folder / f"{i}.cubin"),
                frozenset(e["overlapping"]),
            )
            for i, e in enumerate(entries)
        ]

    @cached_property
    def module(self) -> Any:
        """Loaded on the device."""
        return cp.RawModule(path=str(self.code))

    def resources(self) -> dict[str, dict[str, int]]:
        """What the driver says of each kernel: registers, and bytes of local memory, into which registers spill."""
        found = {}
        for kernel in kernels_of(self.table):
            attributes = self.module.get_function(kernel).attributes
            found[kernel] = {name: attributes[name] for name in ("num_regs", "local_size_bytes", "shared_size_bytes")}
        return found

    def call(self, arguments: Sequence[torch.Tensor], *, in_turn: bool = False) -> Call:
        """Launches for tensors in the PrimFunc's order: x, the arrays of W, what the epilogue reads, y.

        `in_turn`: none before the one ahead has ended.
        """
        kinds = [np.dtype(param["dtype"]) for param in self.table["params"]]
        stand_ins = [np.empty(tuple(t.shape), kind) for t, kind in zip(arguments, kinds, strict=True)]
        pointers = {id(array): tensor.data_ptr() for array, tensor in zip(stand_ins, arguments, strict=True)}
        recorder, workspaces = Recorder(), []
        run_prim_func(self.table, recorder, stand_ins)  # type: ignore[arg-type]
        launches = []
        for kernel, args, grid, block, shared in recorder.launches:
            for array in args:
                if isinstance(array, np.ndarray) and id(array) not in pointers:
                    workspaces.append((array, torch.empty(array.nbytes, dtype=torch.uint8, device="cuda")))
                    pointers[id(array)] = workspaces[-1][1].data_ptr()
            function = self.module.get_function(kernel)
            if shared > STATIC_SHARED:
                function.max_dynamic_shared_size_bytes = shared
            # A kernel's int32 is the lower half.
            values = tuple(np.int64(pointers[id(a)] if isinstance(a, np.ndarray) else a) for a in args)
            early = kernel in self.overlapping and not in_turn
            launches.append((partial(launch_early, function) if early else function, grid, block, values, shared))

        def run(_kept: Any = (workspaces, arguments)) -> None:
            for function, grid, block, values, shared in launches:
                function(grid, block, values, shared_mem=shared)

        return run


class Weights:
    """A random W of INT4 codes in the forms that each needs, in copies; all stand for the same numbers.

    Scales have eight significant bits, so that they are exact in bfloat16 as well.
    """

    def __init__(self, problem: MatmulProblem, generator: torch.Generator) -> None:
        self.problem, (n, k) = problem, (problem.n, problem.k)
        spec = problem.spec
        assert isinstance(spec, QuantSpec) and (spec.bits, spec.symmetric, spec.order) == (4, True, "NK"), spec
        self.copies = max(2, -(-ROTATED_BYTES // problem.weight_nbytes))
        words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32, device="cuda", generator=generator)
        scales = torch.rand((n, k // spec.group), device="cuda", generator=generator) + 0.5
        sign = torch.randint(0, 2, scales.shape, device="cuda", generator=generator) * 2 - 1
        scales = (scales * sign / 128).bfloat16().half()
        self.packed = [(words.clone(), scales.clone()) for _ in range(self.copies)]

    def exact(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """(N, K), by the one definition of the layout."""
        spec, (words, scales) = self.problem.spec, self.packed[0]
        assert isinstance(spec, QuantSpec)
        n, k = self.problem.n, self.problem.k
        place = torch.arange(k, device="cuda")
        codes = spec.layout.code(lambda i: words[:, i].long() & 0xFFFFFFFF, place)
        return ((codes - spec.zero).to(dtype).view(n, -1, spec.group) * scales.to(dtype)[:, :, None]).view(n, k)

    @cached_property
    def float16(self) -> list[torch.Tensor]:
        """Decoded, in fewer copies, since each is larger."""
        w = self.exact(torch.float32).half()
        return [w, *(w.clone() for _ in range(max(2, -(-self.copies // 4)) - 1))]

    @cached_property
    def of_torch(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(weights in torch's order, scale and zero) for w = (q - 8) scale + zero in bfloat16."""
        words, scales = self.packed[0]
        low_first = words.view(torch.uint8)
        high_first = (low_first & 15) << 4 | low_first >> 4  # of two codes, the earlier in the upper half
        weight = torch._convert_weight_to_int4pack(high_first, 8)
        scale = scales.T.bfloat16()
        both = torch.stack([scale, scale], 2).contiguous()  # (K/128, N, 2): (q - 7) s = (q - 8) s + s
        return [(weight.clone(), both.clone()) for _ in range(self.copies)]


@dataclass
class Contest:
    """One problem with `rows` rows of x: calls that fill y, one for each copy of W."""

    weights: Weights
    linears: Sequence[Linear]
    x: torch.Tensor

    def __post_init__(self) -> None:
        self.rows, self.problem = len(self.x), self.weights.problem
        self.y = torch.empty(self.rows, self.problem.n, dtype=torch.float16, device="cuda")
        self.notes: dict[str, str] = {}

    @property
    def rivals(self) -> dict[str, Callable[[], list[Call]]]:
        """By name, where it applies to so many rows."""
        found = {"ours": self.ours, "cublas": self.cublas, "decode_cublas": self.decode_cublas}
        found |= {"triton": self.triton, "dlight": self.dlight}
        if self.rows <= 256:
            found["torch_int4"] = self.torch_int4
        if any(each.by == "ours" and each.overlapping for each in self.linears):
            found["in_turn"] = self.in_turn
        if self.rows > 8:
            found["mma_float16"] = self.mma_float16
        return found

    def few(self, copies: Sequence[Any]) -> Sequence[Any]:
        """The copies of W that take turns."""
        return copies if self.rows <= ROTATED_ROWS else copies[:2]

    def launched(self, by: str, copies: Sequence[Sequence[torch.Tensor]], *, in_turn: bool = False) -> list[Call]:
        """By kernels of the bundle: the last that serves as many rows."""
        serving = [each for each in self.linears if each.by == by and each.first <= self.rows]
        linear = max(serving, key=lambda each: each.first)
        return [linear.call([self.x, *arrays, self.y], in_turn=in_turn) for arrays in self.few(copies)]

    def ours(self) -> list[Call]:
        """The kernel of the bucket."""
        return self.launched("ours", self.weights.packed)

    def in_turn(self) -> list[Call]:
        """The same, each after the end of the one before."""
        return self.launched("ours", self.weights.packed, in_turn=True)

    def dlight(self) -> list[Call]:
        """MLC's schedules."""
        return self.launched("dlight", self.weights.packed)

    def mma_float16(self) -> list[Call]:
        """Our GEMM over float16 weights."""
        return self.launched("float16", [[w] for w in self.weights.float16])

    def cublas(self) -> list[Call]:
        """torch's float16 matmul."""
        return [lambda w=w: torch.matmul(self.x, w.T, out=self.y) for w in self.few(self.weights.float16)]

    def torch_int4(self) -> list[Call]:
        """torch's own INT4, in bfloat16."""
        x = self.x.bfloat16()
        return [
            lambda w=w, s=s: self._keep(torch._weight_int4pack_mm(x, w, 128, s))
            for w, s in self.few(self.weights.of_torch)
        ]

    def _keep(self, y: torch.Tensor) -> None:
        self.last = y

    def triton(self) -> list[Call]:
        """The fastest of its configurations for so many rows."""
        import triton_w4a16

        tried = {}
        for config in triton_w4a16.configs(self.rows):
            try:
                tried[config] = graph_seconds(self._triton(config), least=3, most=3)
            except Exception as error:  # too much shared memory, say
                self.notes[f"triton {config}"] = f"{type(error).__name__}: {error}"[:200]
        best = min(tried, key=lambda config: tried[config])
        self.notes["triton"] = str(best)
        return self._triton(best)

    def _triton(self, config: Any) -> list[Call]:
        import triton_w4a16

        return [
            lambda w=w, s=s: triton_w4a16.linear(config, self.x, w, s, self.y) for w, s in self.few(self.weights.packed)
        ]

    def decode_cublas(self) -> list[Call]:
        """W becomes float16 in one buffer, then cuBLAS."""
        import triton_w4a16

        buffer = torch.empty_like(self.weights.float16[0])

        def call(words: torch.Tensor, scales: torch.Tensor) -> None:
            triton_w4a16.dequantise(words, scales, buffer)
            torch.matmul(self.x, buffer.T, out=self.y)

        return [lambda w=w, s=s: call(w, s) for w, s in self.few(self.weights.packed)]

    def error_of(self, call: Call, exact: torch.Tensor) -> float:
        """The largest error of what one call computes, over the largest value; of up to 128 rows, spread evenly."""
        self.y.fill_(float("nan"))
        self.last = self.y
        with launching(torch.cuda.current_stream()):
            call()
        torch.cuda.synchronize()
        at = torch.linspace(0, self.rows - 1, min(self.rows, 128), device="cuda").round().long()
        expected = self.x[at].double() @ exact.T
        error = (self.last[at].double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        return float(error)
