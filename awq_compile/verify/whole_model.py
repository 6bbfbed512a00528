"""The whole model through a GPU library's own kernels, on this machine, against the CPU library's logits.

Both libraries get the same tokens: those that the CPU library finds likeliest. A prompt longer than the prefill
chunk goes in in parts and is decoded alone; then three sequences of different lengths go in together and are
decoded together. Every logit must be within the tolerance, and so no token can differ but for a tie within it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.compiler import CompileContext, compile_library
from awq_compile.errors import AwqCompileError, EnvironmentMissingError
from awq_compile.limits import CompileOptions
from awq_compile.manifest import Dist
from awq_compile.models.parameters import model_parameters
from awq_compile.runtime import engine
from awq_compile.runtime.lean_tvm import Shape, tvm
from awq_compile.targets import resolve_target
from awq_compile.targets.base import TargetSpec
from awq_compile.tuning.database import known_records
from awq_compile.verify.device_vm import device_vm, initialised
from awq_compile.verify.dist import compiled_from
from awq_compile.verify.tolerance import ROUNDOFF

F32 = npt.NDArray[np.float32]
STEPS: Final = 12  # tokens decoded, of one sequence and then of three
# Where a layer rounds to half precision: two norms, q k v, their rotation, attention, its merging, two sums with the
# residual, and the product of gate and up. Outside of layers: embedding, last norm, logits.
_ROUNDINGS_OF_LAYER: Final = 9
_ROUNDINGS_OUTSIDE: Final = 3


@dataclass(frozen=True)
class WholeModelVerification:
    """What came out. Where it passed, `differing` of the `tokens` were ties within the tolerance."""

    device: str
    tokens: int
    differing: int
    max_difference: float
    tolerance: float
    launches: Mapping[str, int]  # by kernel
    seconds: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Every logit within the tolerance."""
        return not self.failure and self.tokens > 0 and self.max_difference <= self.tolerance

    def words(self) -> str:
        """For people."""
        if self.failure:
            return f"the whole model fails after {self.tokens} tokens: {self.failure}"
        return (
            f"{self.tokens - self.differing} of {self.tokens} greedy tokens are the CPU library's, "
            f"logits within {self.max_difference:.2g} (at most {self.tolerance:.2g} is allowed), on {self.device}"
        )


@dataclass(frozen=True)
class Prompts:
    """`long` goes in alone, in parts of the prefill chunk; all of `batch` at once."""

    long: Sequence[int]
    batch: Sequence[Sequence[int]]

    @staticmethod
    def random(context: CompileContext, steps: int) -> Prompts:
        """Of lengths that fit the library's limits."""
        options, rng = context.options, np.random.default_rng(0)
        chunk = options.prefill_chunk_size
        long = max(1, min(chunk + chunk // 2 + 3, options.context_window_size - steps))
        batch = [max(1, n) for n in (min(chunk // 8, 5), min(chunk // 2, 33), min(chunk // 4, 18))]
        ids = [rng.integers(0, context.config.vocab_size, n).tolist() for n in (long, *batch)]
        return Prompts(ids[0], ids[1 : 1 + min(options.max_batch_size, chunk)])


def tolerance(layers: int, dtype: str) -> float:
    """Largest difference of a logit, as a share of the largest one: 2 √n u for n roundings, which are independent."""
    return 2 * math.sqrt(_ROUNDINGS_OF_LAYER * layers + _ROUNDINGS_OUTSIDE) * ROUNDOFF[dtype]


def verify_whole_model(
    dist: Dist, target: TargetSpec, *, prompts: Prompts | None = None, steps: int = STEPS
) -> WholeModelVerification:
    """Runs the library for `target` by its executor, beside the CPU library of the DIST or one compiled for it.

    Raises `EnvironmentMissingError` where nothing here runs the library's kernels.
    """
    started = time.monotonic()
    context = _context(dist, target)
    with _cpu_library(dist, context) as cpu, device_vm(dist.library(target.name), context) as device:
        comparison = _Comparison(_Model(dist, cpu, context.options), _Model(dist, device.vm, context.options))
        failure = ""
        try:
            comparison.run(prompts or Prompts.random(context, steps), steps)
        except EnvironmentMissingError:
            raise
        except (AwqCompileError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            failure = str(device.failure or error)
    return WholeModelVerification(
        device.device,
        comparison.tokens,
        comparison.differing,
        comparison.worst,
        tolerance(context.config.num_layers, target.dtype) * comparison.scale,
        dict(device.launches),
        time.monotonic() - started,
        failure,
    )


def _context(dist: Dist, target: TargetSpec) -> CompileContext:
    """From what the library was compiled, as the DIST says."""
    config, scheme, options = compiled_from(dist)
    parameters = tuple(model_parameters(config, scheme))
    return CompileContext(config, scheme, target, options, parameters, known_records())


@contextmanager
def _cpu_library(dist: Dist, context: CompileContext) -> Iterator[Any]:
    """Its virtual machine."""
    if "cpu" in dist.manifest.libraries:
        yield engine.load_library(dist, dist.library("cpu"))
        return
    with TemporaryDirectory(prefix="awq-compile-") as folder:
        cpu = resolve_target("cpu")
        library = Path(folder) / f"reference{cpu.library_suffix}"
        compile_library(context.config, context.scheme, cpu, context.options, library)
        yield initialised(tvm.runtime.load_module(str(library)))


class _Model:
    """A library's functions, its parameters, and a KV cache for several sequences."""

    def __init__(self, dist: Dist, vm: Any, options: CompileOptions) -> None:
        self._vm = vm
        self._params = engine.load_params(dist, engine.read_metadata(vm, dist.path), tvm.cpu())
        self.chunk = options.prefill_chunk_size
        total = options.cached_tokens + options.max_batch_size * options.page_size
        sizes = (options.max_batch_size, total, options.prefill_chunk_size, options.page_size, 0)
        self._cache = self._function("create_tir_paged_kv_cache")(*(Shape([size]) for size in sizes))

    def restart(self, sequences: int) -> None:
        """Empties the cache for sequences 0, 1, …"""
        engine.builtin("kv_state_clear")(self._cache)
        for sequence in range(sequences):
            engine.builtin("kv_state_add_sequence")(self._cache, sequence)

    def __call__(self, name: str, new: Mapping[int, Sequence[int]]) -> F32:
        """Function `name` on new tokens of sequences: logits (sequences, V) behind the last of each."""
        lengths = [len(tokens) for tokens in new.values()]
        ids = np.array([token for tokens in new.values() for token in tokens], np.int32)
        embeds = self._function("embed")(tvm.runtime.tensor(ids), self._params)
        shape = (len(ids), 1) if name == "batch_decode" else (1, len(ids))
        embeds = engine.builtin("reshape")(embeds, Shape([*shape, embeds.shape[1]]))
        ends = tvm.runtime.tensor((np.cumsum(lengths) - 1).astype(np.int32))
        engine.builtin("kv_state_begin_forward")(self._cache, Shape(list(new)), Shape(lengths))
        positions = [ends] if name == "batch_prefill" else []
        result = self._function(name)(embeds, *positions, self._cache, self._params)
        engine.builtin("kv_state_end_forward")(self._cache)
        logits: F32 = result[0].numpy()
        return logits.reshape(len(new), -1)

    def _function(self, name: str) -> Any:
        return self._vm.get_function(name, query_imports=True)


class _Comparison:
    """The CPU library's model and the device's, step by step."""

    def __init__(self, cpu: _Model, device: _Model) -> None:
        self._cpu, self._device = cpu, device
        self.tokens = self.differing = 0
        self.worst = self.scale = 0.0

    def run(self, prompts: Prompts, steps: int) -> None:
        """All of them."""
        chunk = self._cpu.chunk
        self._restart(1)
        for start in range(0, len(prompts.long), chunk):
            tokens = self._step("prefill", {0: prompts.long[start : start + chunk]})
        for _ in range(steps):
            tokens = self._step("decode", {0: tokens})
        self._restart(len(prompts.batch))
        tokens = self._step("batch_prefill", dict(enumerate(prompts.batch)))
        for _ in range(steps):
            tokens = self._step("batch_decode", {i: [token] for i, token in enumerate(tokens)})

    def _restart(self, sequences: int) -> None:
        for model in (self._cpu, self._device):
            model.restart(sequences)

    def _step(self, name: str, new: Mapping[int, Sequence[int]]) -> list[int]:
        """Runs both, compares, and returns what the CPU library finds likeliest."""
        expected, found = self._cpu(name, new), self._device(name, new)
        difference = float(np.abs(expected.astype(np.float64) - found).max())
        self.worst = max(self.worst, difference if math.isfinite(difference) else math.inf)
        self.scale = max(self.scale, float(np.abs(expected).max()))
        tokens: list[int] = expected.argmax(1).tolist()
        self.tokens += len(tokens)
        self.differing += sum(a != b for a, b in zip(tokens, found.argmax(1).tolist(), strict=True))
        return tokens
