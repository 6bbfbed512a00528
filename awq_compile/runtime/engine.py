"""Runs a compiled model: loads a library as MLC's C++ engine does, and generates with it.

The library's functions and the KV cache do the work; sampling is NumPy. One `Engine` holds one sequence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.errors import ArtifactError, AwqCompileError, UsageError
from awq_compile.json_input import parse_json
from awq_compile.manifest import CHAT_CONFIG, Dist, open_dist
from awq_compile.runtime.lean_tvm import Shape, tvm
from awq_compile.runtime.memory import peak_memory_bytes
from awq_compile.runtime.threads import use_threads
from awq_compile.targets import resolve_target

F32 = npt.NDArray[np.float32]

_POOLED: Final = 2  # TVM's AllocatorType::kPooled
_CPU: Final = 1  # DLPack's kDLCPU
_SEQUENCE: Final = 0  # the one sequence in the KV cache
_ENDLESS: Final = 2**31 - 1
COMPILE_HERE: Final = "awq-compile MODEL --target cpu"


@dataclass(frozen=True)
class LibraryMetadata:
    """What a library says of itself (`_metadata`)."""

    model_type: str
    quantization: str
    active_vocab_size: int  # logits behind so many are of no token
    context_window_size: int  # -1: without end, where a window slides
    prefill_chunk_size: int
    page_size: int
    sliding_window_size: int  # -1: none
    attention_sink_size: int
    params: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype, in the order the functions take them

    @property
    def cached_tokens(self) -> int:
        """Positions that the KV cache needs for one sequence; part pages lie at both ends of a sliding window."""
        if self.sliding_window_size <= 0:
            return self.context_window_size
        return self.sliding_window_size + self.prefill_chunk_size + 2 * self.page_size


@dataclass(frozen=True)
class Speed:
    """Tokens per second over several runs."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(tokens: int, seconds: Sequence[float]) -> Speed:
        """From the time that each run took for `tokens`."""
        rates = [tokens / s for s in seconds]
        return Speed(statistics.median(rates), min(rates), max(rates))


@dataclass(frozen=True)
class BenchResult:
    """What `Engine.bench` measured."""

    prefill_tokens: int
    decode_tokens: int
    prefill: Speed
    decode: Speed
    peak_memory_bytes: int
    threads: int


class Engine:
    """A library of a DIST, loaded with its weights on this machine's CPU."""

    def __init__(self, dist: Path | Dist, *, target: str | None = None, threads: int | None = None) -> None:
        """Loads the library for `target`, or one that runs here. Raises `ArtifactError` for a damaged directory."""
        self.dist = dist if isinstance(dist, Dist) else open_dist(dist)
        self.threads = use_threads(threads)
        self._device = tvm.cpu()
        self._library = library_for_here(self.dist, target)
        self._vm = load_library(self.dist, self._library)
        self.metadata = read_metadata(self._vm, self._library)
        self._params = load_params(self.dist, self.metadata, self._device)
        self._functions: dict[str, Any] = {}
        self._held: list[int] = []  # tokens of the sequence whose keys and values the cache holds
        slides = self.metadata.sliding_window_size > 0
        sizes = (1, self.metadata.cached_tokens, self.prefill_chunk_size, self.metadata.page_size, int(slides))
        self._cache = self._function("create_tir_paged_kv_cache")(*(Shape([size]) for size in sizes))

    @property
    def context_window_size(self) -> int:
        """Most tokens of a sequence, prompt and output together; all that int32 counts where a window slides."""
        return self.metadata.context_window_size if self.metadata.context_window_size > 0 else _ENDLESS

    @property
    def attention_window(self) -> int:
        """How far back a token sees."""
        window = self.metadata.sliding_window_size
        return window if window > 0 else self.context_window_size

    @property
    def prefill_chunk_size(self) -> int:
        """Most tokens that one call takes."""
        return self.metadata.prefill_chunk_size

    @property
    def vocab_size(self) -> int:
        """Number of logits, from mlc-chat-config.json."""
        size = self.dist.chat_config.get("vocab_size")
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ArtifactError(
                f"{self.dist.path / CHAT_CONFIG}: vocab_size is {size!r:.80}, expected a positive number"
            )
        return size

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a generation, from mlc-chat-config.json."""
        template = self.dist.chat_config.get("conv_template")
        ids = template.get("stop_token_ids", []) if isinstance(template, dict) else None
        if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ArtifactError(
                f"{self.dist.path / CHAT_CONFIG}: conv_template.stop_token_ids is not a list of token ids"
            )
        return frozenset(ids)

    def logits(self, tokens: Sequence[int] | npt.NDArray[Any]) -> F32:
        """(T, V) logits of every position of a sequence of its own."""
        ids = self._token_ids(tokens)
        self._restart(len(ids))
        parts = [self._forward("batch_verify", part)[0] for part in self._chunks(ids)]
        return np.concatenate(parts)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Collection[int] = (),
        go_on: bool = False,
    ) -> Iterator[int]:
        """Yields tokens as they are chosen, until one of `stop_ids` (not yielded) or `max_tokens`.

        With `go_on` the beginning that `prompt` shares with the sequence before it is not computed again.

        Temperature 0 takes the likeliest token. Without `max_tokens` it goes on to the end of the context
        window. A prompt and `max_tokens` that exceed the window together are refused before anything runs.
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise UsageError(
                f"temperature is {temperature} and top-p {top_p}, expected at least 0, and above 0 up to 1"
            )
        ids = self._token_ids(prompt)
        room = self.context_window_size - len(ids)
        if room < (1 if max_tokens is None else max_tokens):
            wanted = "no room for output" if max_tokens is None else f"{max_tokens} new ones do not fit"
            shorter = "a shorter prompt, or compile with a larger --context-window-size"
            raise UsageError(
                f"the prompt has {len(ids)} tokens, and {wanted}: "
                f"the library's context window is {self.context_window_size} tokens",
                hint=f"--max-tokens {room}" if room > 0 else shorter,
            )
        random = np.random.default_rng(seed)
        most = room if max_tokens is None else max_tokens
        active = self.metadata.active_vocab_size

        def choose(logits: F32) -> int:
            return sample(logits[:active], temperature, top_p, random)

        return self._generate(ids, most, choose, stop_ids, go_on)

    def held_prefix(self, prompt: Sequence[int] | npt.NDArray[Any]) -> int:
        """Tokens of `prompt` that `go_on` need not compute: it always computes the last, for its logits."""
        most = min(len(self._held), len(prompt) - 1)
        same = next((i for i in range(most) if self._held[i] != prompt[i]), most)
        slides = self.metadata.sliding_window_size > 0  # then the cache has let go of tokens, and takes none back
        return 0 if slides and same < len(self._held) else same

    def _generate(
        self,
        ids: npt.NDArray[np.int32],
        most: int,
        choose: Callable[[F32], int],
        stop_ids: Collection[int],
        go_on: bool,
    ) -> Iterator[int]:
        if most == 0:
            return
        held = self.held_prefix(ids) if go_on else 0
        if held:
            self._take_back(len(self._held) - held)
        else:
            self._restart(len(ids))
        logits = self._prefill(ids[held:])
        for count in range(1, most + 1):
            token = choose(logits)
            if token in stop_ids:
                return
            yield token
            if count < most:
                logits = self._forward("decode", np.array([token], np.int32))[0, 0]

    def bench(self, prefill_tokens: int = 128, decode_tokens: int = 64, *, runs: int = 5) -> BenchResult:
        """Speed of a prompt and of decoding behind it, after one run that is not counted."""
        prompt = np.random.default_rng(0).integers(0, self.vocab_size, prefill_tokens).astype(np.int32)
        one = prompt[:1]
        prefill_seconds, decode_seconds = [], []
        for run in range(runs + 1):
            self._restart(prefill_tokens + decode_tokens)
            start = time.perf_counter()
            self._prefill(prompt)
            middle = time.perf_counter()
            for _ in range(decode_tokens):
                self._forward("decode", one)
            end = time.perf_counter()
            if run > 0:
                prefill_seconds.append(middle - start)
                decode_seconds.append(end - middle)
        return BenchResult(
            prefill_tokens,
            decode_tokens,
            Speed.of(prefill_tokens, prefill_seconds),
            Speed.of(decode_tokens, decode_seconds),
            peak_memory_bytes(),
            self.threads,
        )

    def _token_ids(self, tokens: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        ids = np.asarray(tokens, np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise UsageError("a prompt needs at least one token")
        for wrong in ids[(ids < 0) | (ids >= self.vocab_size)][:1]:
            raise UsageError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")
        return ids.astype(np.int32)

    def _chunks(self, ids: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        return [ids[i : i + self.prefill_chunk_size] for i in range(0, len(ids), self.prefill_chunk_size)]

    def _prefill(self, ids: npt.NDArray[np.int32]) -> F32:
        """Logits (V,) behind the last token."""
        for part in self._chunks(ids):
            logits = self._forward("prefill", part)
        return np.asarray(logits[0, 0])

    def _restart(self, length: int) -> None:
        """Empties the KV cache for a sequence that will have up to `length` tokens."""
        if length > self.context_window_size:
            raise UsageError(
                f"{length} tokens do not fit the library's context window of {self.context_window_size}",
                hint="a shorter text, or compile with a larger --context-window-size",
            )
        self._held = []
        builtin("kv_state_clear")(self._cache)
        builtin("kv_state_add_sequence")(self._cache, _SEQUENCE)
        if (window := self.metadata.sliding_window_size) > 0:
            sink = max(self.metadata.attention_sink_size, 0)
            builtin("attention_kv_cache_enable_sliding_window_for_seq")(self._cache, _SEQUENCE, window, sink)

    def _take_back(self, count: int) -> None:
        """Removes the last tokens of the sequence from the cache."""
        if count:
            builtin("kv_state_popn")(self._cache, _SEQUENCE, count)
            del self._held[-count:]

    def _forward(self, name: str, ids: npt.NDArray[np.int32]) -> F32:
        """Embeds tokens, appends them to the sequence through function `name`, and returns its logits."""
        count = len(ids)
        held, self._held = self._held, []  # what an interrupted call leaves in the cache is not gone on from
        embeds = self._function("embed")(tvm.runtime.tensor(ids, self._device), self._params)
        embeds = builtin("reshape")(embeds, Shape([1, count, embeds.shape[1]]))
        builtin("kv_state_begin_forward")(self._cache, Shape([_SEQUENCE]), Shape([count]))
        result = self._function(name)(embeds, self._cache, self._params)
        builtin("kv_state_end_forward")(self._cache)
        held.extend(ids.tolist())
        self._held = held
        return np.asarray(result[0].numpy())

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            self._functions[name] = library_function(self._vm, name, self._library)
        return self._functions[name]


def sample(logits: F32, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """A token from (V,) logits: the likeliest at temperature 0, else from the smallest set that holds `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-probabilities, kind="stable")
    total = np.cumsum(probabilities[order])
    kept = min(int(np.searchsorted(total, top_p * total[-1])) + 1, len(total))
    return int(
        order[min(int(np.searchsorted(total[:kept], random.random() * total[kept - 1], side="right")), kept - 1)]
    )


def builtin(name: str) -> Any:
    return tvm.get_global_func(f"vm.builtin.{name}")


def library_function(vm: Any, name: str, library: Path) -> Any:
    try:
        return vm.get_function(name, query_imports=True)
    except AttributeError:
        raise ArtifactError(f"{library} has no function {name!r}", hint="compile again with this version") from None


def library_for_here(dist: Dist, target: str | None = None) -> Path:
    """The library for `target`; by default this CPU's, else that for CPUs like it, which may well load.

    Raises `ArtifactError` for one that no CPU runs.
    """
    libraries = dist.manifest.libraries
    loadable = [n for n, e in libraries.items() if e.tvm_target.get("kind") == "llvm" and not e.path.endswith(".tar")]
    default = next(iter([*filter(_runs_here, loadable), *loadable]), None)
    path = dist.library(target or default)
    if (target or default) not in loadable:
        raise ArtifactError(
            f"{path} is no library that this machine's CPU loads, and {dist.path} has them for {', '.join(libraries)}",
            hint=f"--target {default}" if default else f"compile for this machine: {COMPILE_HERE}",
        )
    return path


def _runs_here(name: str) -> bool:
    try:
        return resolve_target(name).runs_here
    except AwqCompileError:  # a name in a stranger's manifest
        return False


def load_library(dist: Dist, path: Path) -> Any:
    """The library's virtual machine, initialised on the CPU."""
    dist.verify_file(path)  # code is about to run: a changed byte may do anything
    try:
        vm = tvm.runtime.load_module(str(path))["vm_load_executable"]()
        vm["vm_initialization"](_CPU, 0, _POOLED, _CPU, 0, _POOLED)
    except (RuntimeError, ValueError, AttributeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ArtifactError(
            f"{path} cannot be loaded on this machine: {reason[0]}", hint=f"compile for this machine: {COMPILE_HERE}"
        ) from None
    return vm


def read_metadata(vm: Any, library: Path) -> LibraryMetadata:
    """`_metadata` of a library, typed."""
    text = library_function(vm, "_metadata", library)()
    try:
        data = parse_json(str(text))
        params = tuple((str(p["name"]), tuple(int(d) for d in p["shape"]), str(p["dtype"])) for p in data["params"])
        return LibraryMetadata(
            str(data["model_type"]),
            str(data["quantization"]),
            int(data["active_vocab_size"]),
            int(data["context_window_size"]),
            int(data["prefill_chunk_size"]),
            int(data["kv_cache"]["page_size"]),
            int(data["sliding_window_size"]),
            int(data["attention_sink_size"]),
            params,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{library}: its metadata is damaged ({error!r})", hint="compile again") from None


def load_params(dist: Dist, metadata: LibraryMetadata, device: Any) -> Any:
    """The parameters in the order of the metadata, after comparing their shapes with tensor-cache.json."""
    stored = {record.name: (record.shape, record.dtype) for record in dist.tensors}
    for name, shape, dtype in metadata.params:
        if stored.get(name) != (shape, dtype):
            found = "it is missing" if name not in stored else f"it is {stored[name][1]} {stored[name][0]}"
            raise ArtifactError(
                f"{dist.path}: the library expects parameter {name} as {dtype} {shape}, and {found}",
                hint="library and parameters come from different runs: compile again",
            )
    try:
        builtin("tensor_cache.load")(str(dist.path), device.dlpack_device_type(), device.index)
        return builtin("param_array_from_cache_by_name")([name for name, _, _ in metadata.params])
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(f"{dist.path}: the parameters cannot be read: {error}") from None
    finally:
        builtin("tensor_cache.clear")()
