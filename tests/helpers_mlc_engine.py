"""MLC's serving engine, call by call: what its C++ asks of a library, in its order and with its forms of arguments.

Written after mlc-llm's cpp/serve: function_table.cc, model.cc, logit_processor.cc, sampler/*.cc, engine_actions/*.cc.
As there, arguments are views of larger buffers; here, what lies behind a view is garbage. Where the device is this
machine's CPU, buffers of host and device are one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import tvm
from tvm_ffi import Shape

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
POOLED: Final = 2  # AllocatorType::kPooled
CPU: Final = 1  # kDLCPU
PAGE: Final = 16  # EngineConfig's kv_cache_page_size
DRAFT_SLOTS: Final = 32
_EPSILON: Final = 1e-5


def load_vm(library: Path) -> Any:
    """The library's virtual machine, initialised for the CPU."""
    vm = tvm.runtime.load_module(str(library))["vm_load_executable"]()
    vm["vm_initialization"](CPU, 0, POOLED, CPU, 0, POOLED)
    return vm


def builtin(name: str, *arguments: Any) -> Any:
    """Calls `vm.builtin.NAME`."""
    return tvm.get_global_func(f"vm.builtin.{name}")(*arguments)


def view(tensor: Any, shape: Sequence[int], offset: int = 0) -> Any:
    """The same memory in another shape, from byte `offset` on."""
    return tensor._create_view(tuple(shape), str(tensor.dtype), offset)


class Model:
    """`ModelImpl` and its `FunctionTable`: a library, its parameters, and a KV cache for several sequences."""

    def __init__(self, folder: Path, vm: Any) -> None:
        self._vm = vm
        config = json.loads((folder / "mlc-chat-config.json").read_text())
        self.metadata = json.loads(str(self.function("_metadata")()))
        self.vocab_size: int = config["vocab_size"]
        self.sliding_window: int = config.get("sliding_window_size", -1)
        self._sink = max(config.get("attention_sink_size", 0), 0)
        self.chunk = min(config["prefill_chunk_size"], self.metadata["prefill_chunk_size"])
        self.max_sequences: int = self.metadata["max_batch_size"]
        self._buffers: dict[str, Any] = {}
        builtin("tensor_cache.load", str(folder), CPU, 0)
        self._params = builtin("param_array_from_cache_by_name", [p["name"] for p in self.metadata["params"]])
        builtin("tensor_cache.clear")
        slides = self.sliding_window != -1
        window = self.sliding_window + self.chunk + 2 * PAGE if slides else self.metadata["context_window_size"]
        sizes = (self.max_sequences, self.max_sequences * window, self.chunk, PAGE, int(slides))
        assert not self.implements("create_flashinfer_paged_kv_cache") and not self.implements("create_rnn_state")
        self._cache = self.function("create_tir_paged_kv_cache")(*(Shape([size]) for size in sizes))
        self.embeddings = self.function("alloc_embedding_tensor")()
        rows, self.hidden_size = self.embeddings.shape
        assert rows >= self.chunk

    def implements(self, name: str) -> bool:
        """Whether the engine would find it."""
        return bool(self._vm.implements_function(name, query_imports=True))

    def function(self, name: str) -> Any:
        """By name in the library; a library without its device's runtime has its PrimFuncs among TVM's globals."""
        if self.implements(name):
            return self._vm.get_function(name, query_imports=True)
        return tvm.get_global_func(name)

    def argument(self, key: str, array: npt.NDArray[Any], most: int) -> Any:
        """`CopyToWorker0`: the front of a buffer of `most` rows, which is the same at every call."""
        assert len(array) <= most, key
        if key not in self._buffers:
            garbage = np.full((most, *array.shape[1:]), 0x7F7F7F7F, np.int32).view(array.dtype)
            self._buffers[key] = tvm.runtime.tensor(garbage)
        part = view(self._buffers[key], array.shape)
        if array.size:
            part.copyfrom(np.ascontiguousarray(array))
        return part

    def state(self, name: str, *arguments: Any) -> None:
        """Calls `kv_state_NAME` on the cache."""
        builtin(f"kv_state_{name}", self._cache, *arguments)

    def add_sequence(self, sequence: int) -> None:
        """`AddNewSequence`."""
        self.state("add_sequence", sequence)

    def slide(self, sequence: int) -> None:
        """`EnableSlidingWindowForSeq`."""
        if self.sliding_window != -1:
            window = (self.sliding_window, self._sink)
            builtin("attention_kv_cache_enable_sliding_window_for_seq", self._cache, sequence, *window)

    def available_pages(self) -> int:
        """`GetNumAvailablePages`."""
        return int(builtin("attention_kv_cache_get_num_available_pages", self._cache))

    def token_embed(self, tokens: Sequence[int], offset: int | None = None) -> Any:
        """(n, H); with an offset, the tensor of all embeddings, after a copy to its rows from there on."""
        found = self.function("embed")(self.argument("token_ids", np.array(tokens, np.int32), self.chunk), self._params)
        assert tuple(found.shape) == (len(tokens), self.hidden_size)
        if offset is None:
            return found
        row = self.hidden_size * np.dtype(str(found.dtype)).itemsize
        view(self.embeddings, found.shape, offset * row).copyfrom(found)
        return self.embeddings

    def batch_prefill(self, embeddings: Any, ids: Sequence[int], lengths: Sequence[int]) -> Any:
        """Logits (1, b, V) behind the last of each."""
        ends = self.argument("logit_pos", (np.cumsum(lengths) - 1).astype(np.int32), self.max_sequences)
        name, positions = ("prefill", ()) if len(ids) == 1 else ("batch_prefill", (ends,))
        return self._forward(name, embeddings, (1, sum(lengths)), ids, lengths, positions, (1, len(ids)))

    def batch_decode(self, embeddings: Any, ids: Sequence[int]) -> Any:
        """Logits (b, 1, V)."""
        name, b = "decode" if len(ids) == 1 else "batch_decode", len(ids)
        return self._forward(name, embeddings, (b, 1), ids, [1] * b, (), (b, 1))

    def batch_verify(self, embeddings: Any, ids: Sequence[int], lengths: Sequence[int], parents: Sequence[int]) -> Any:
        """Logits (1, n, V) of all nodes; a node's parent is its number in its own tree, -1 the root's."""
        shape = (1, sum(lengths))
        return self._forward("batch_verify", embeddings, shape, ids, lengths, (), shape, Shape(list(parents)))

    def commit_tree_nodes(self, ids: Sequence[int], nodes: Sequence[int]) -> None:
        """`CommitAcceptedTokenTreeNodesToKVCache`: of each tree the path to a node stays."""
        arguments = (Shape(list(ids)), Shape(list(nodes)))
        builtin("attention_kv_cache_commit_accepted_token_tree_nodes", self._cache, *arguments)

    def _forward(
        self,
        name: str,
        embeddings: Any,
        shape: tuple[int, int],
        ids: Sequence[int],
        lengths: Sequence[int],
        positions: tuple[Any, ...],
        rows: tuple[int, int],
        *tree: Any,
    ) -> Any:
        self.state("begin_forward", Shape(list(ids)), Shape(list(lengths)), *tree)
        states = view(embeddings, (*shape, self.hidden_size))
        logits = self.function(name)(states, *positions, self._cache, self._params)[0]
        self.state("end_forward")
        assert tuple(logits.shape) == (*rows, self.vocab_size) and str(logits.dtype) == "float32"
        return logits


@dataclass
class Request:
    """A prompt and `GenerationConfig`. `allowed` gives the tokens that may follow an output: a grammar's part."""

    prompt: list[int]
    max_tokens: int = 8
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed: Callable[[Sequence[int]], npt.NDArray[np.bool_]] | None = None
    top_logprobs: int = 0
    seed: int = 0

    @property
    def penalised(self) -> bool:
        """Whether any penalty does anything."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


@dataclass(eq=False)
class Entry:
    """`RequestStateEntry`: a sequence. For tests, `rows` are the logits that its tokens were drawn from."""

    request: Request
    id: int
    inputs: list[int]
    random: np.random.Generator
    children: list[Entry] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    rows: list[F32] = field(default_factory=list)
    uniform: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """All its tokens are there."""
        return len(self.output) >= self.request.max_tokens


Row = tuple[Entry, Sequence[int]]  # whose logits, and the drafted tokens behind its output


class LogitProcessor:
    """`LogitProcessorImpl`: bias, penalties and mask in place, then probabilities."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def update(self, logits: Any, rows: Sequence[Row]) -> None:
        """(b, V), in the C++'s order: masking last."""
        self._bias(logits, rows)
        self._penalise(logits, rows)
        self._mask(logits, rows)

    def probabilities(self, logits: Any, rows: Sequence[Row]) -> Any:
        """(b, V) → (b, V); a greedy request has temperature 0."""
        shape = tuple(logits.shape)
        temperature = self._argument("temperature", [max(entry.request.temperature, 0.0) for entry, _ in rows], "f4")
        function = self._model.function("softmax_with_temperature")
        found = function(view(logits, (shape[0], 1, shape[1])), temperature)
        assert tuple(found.shape) == (shape[0], 1, shape[1])
        return view(found, shape)

    def _argument(self, key: str, values: Any, dtype: str, most: int = 0) -> Any:
        return self._model.argument(f"logits.{key}", np.array(values, dtype), most or self._model.chunk)

    def _bias(self, logits: Any, rows: Sequence[Row]) -> None:
        items = [(i, t, b) for i, (entry, _) in enumerate(rows) for t, b in entry.request.logit_bias.items()]
        if items:
            most = self._model.chunk * self._model.vocab_size
            where, tokens, bias = zip(*items, strict=True)
            self._model.function("apply_logit_bias_inplace")(
                logits,
                self._argument("pos2seq_id", where, "i4", most),
                self._argument("token_ids", tokens, "i4", most),
                self._argument("logit_bias", bias, "f4", most),
            )

    def _penalise(self, logits: Any, rows: Sequence[Row]) -> None:
        """A request that has put nothing out is passed too, with no tokens."""
        chosen = [i for i, (entry, _) in enumerate(rows) if entry.request.penalised]
        if not chosen:
            return
        counts = [Counter([*rows[i][0].output, *rows[i][1]]) for i in chosen]
        items = np.array([(i, t, n) for i, count in enumerate(counts) for t, n in count.items()], "i4").reshape(-1, 3)
        requests = [rows[i][0].request for i in chosen]
        penalties = [[r.presence_penalty, r.frequency_penalty, r.repetition_penalty] for r in requests]
        most = self._model.chunk * self._model.vocab_size
        self._model.function("apply_penalty_inplace")(
            logits,
            self._argument("seq_ids", chosen, "i4"),
            *(
                self._argument(k, items[:, i], "i4", most)
                for i, k in enumerate(("pos2seq_id", "token_ids", "token_cnt"))
            ),
            self._argument("penalties", penalties, "f4"),
        )

    def _mask(self, logits: Any, rows: Sequence[Row]) -> None:
        """The mask has a row for every row of logits; those that are not named hold what was there before."""
        chosen = [i for i, (entry, _) in enumerate(rows) if entry.request.allowed is not None]
        if not chosen:
            return
        words = np.full((len(rows), -(-self._model.vocab_size // 32)), 0x55555555, np.int32)
        for i in chosen:
            entry, drafted = rows[i]
            assert entry.request.allowed is not None
            bits = np.zeros(words.shape[1] * 32, bool)
            bits[: self._model.vocab_size] = entry.request.allowed([*entry.output, *drafted])
            words[i] = np.packbits(bits, bitorder="little").view(np.int32)
        arguments = (self._argument("seq_ids", chosen, "i4"), self._argument("bitmask", words, "i4"))
        self._model.function("apply_bitmask_inplace")(logits, *arguments)


def draw(probabilities: F32, uniform: float) -> int:
    """`SampleTopPFromProb` at top-p 1: the first token at which the running sum reaches `uniform`."""
    return int(np.argmax(np.cumsum(probabilities, dtype=np.float64) >= uniform))


class CpuSampler:
    """`CPUSampler`: the probabilities come to the host. It is MLC's on CPU, OpenCL and ROCm."""

    def renormalized(self, probabilities: Any, top_p: Sequence[float]) -> Any:
        """(b, V), of each row the likeliest tokens that together reach `top_p`."""
        found = probabilities.numpy().copy()
        for row, share in zip(found, top_p, strict=True):
            if share < 1:
                ordered = np.sort(row)[::-1]
                row[row < ordered[np.argmax(np.cumsum(ordered) >= share - _EPSILON)]] = 0
                row /= row.sum()
        return found

    def sample(self, probabilities: F32, indices: Sequence[int], entries: Sequence[Entry]) -> list[int]:
        """A token of each row of `indices`."""
        for entry, i in zip(entries, indices, strict=True):
            ordered = np.argsort(-probabilities[i], kind="stable")[: entry.request.top_logprobs]
            entry.top.append([(int(t), float(probabilities[i, t])) for t in ordered])
        pairs = zip(indices, entries, strict=True)
        return [draw(probabilities[i], _uniform(entry)) for i, entry in pairs]

    def verify(
        self, probabilities: F32, entries: Sequence[Entry], drafts: Sequence[Sequence[int]], draft_probabilities: Any
    ) -> tuple[list[int], list[int]]:
        """Drafted tokens that are accepted, and the token behind them, for each; drafts are chains."""
        proposed, start, accepted, tokens = draft_probabilities.numpy(), 0, [], []
        for entry, draft in zip(entries, drafts, strict=True):
            count = 0
            p = probabilities[start]
            while count < len(draft):
                q, token = proposed[start + count + 1], draft[count]
                if p[token] < q[token] and entry.random.random() >= p[token] / (q[token] + _EPSILON):
                    p = np.maximum(p - q, 0)
                    p /= p.sum()
                    break
                count += 1
                p = probabilities[start + count]
            accepted.append(count)
            tokens.append(draw(p, _uniform(entry)))
            start += len(draft) + 1
        return accepted, tokens


class GpuSampler:
    """`GPUSampler`: the library's functions. It is MLC's on CUDA, Vulkan and Metal."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def _argument(self, key: str, values: Any, dtype: str) -> Any:
        return self._model.argument(f"sampler.{key}", np.array(values, dtype), 5 * self._model.chunk)

    def renormalized(self, probabilities: Any, top_p: Sequence[float]) -> Any:
        """(b, V), of each row the likeliest tokens that together reach `top_p`."""
        if all(share == 1 for share in top_p):
            return probabilities
        left = [1 - share for share in top_p]
        pivots = [[min(r, 0.5), 0.02, 0.01] if r >= 0.02 else [r, r / 2, r / 4] for r in left]
        arguments = (self._argument("top_p", top_p, "f4"), self._argument("init_pivots", pivots, "f4"))
        return self._model.function("renormalize_by_top_p")(probabilities, *arguments)

    def sample(self, probabilities: Any, indices: Sequence[int], entries: Sequence[Entry]) -> list[int]:
        """A token of each row of `indices`; sorted, and with the probabilities, where any request wants those."""
        uniform = self._argument("uniform", [_uniform(entry) for entry in entries], "f4")
        rows = self._argument("sample_indices", indices, "i4")
        wanted = [entry.request.top_logprobs for entry in entries]
        if not any(wanted):
            return self._drawn(probabilities, uniform, rows)
        ordered, order = self._model.function("argsort_probs")(probabilities)
        offsets = [i * self._model.vocab_size + j for i, n in zip(indices, wanted, strict=True) for j in range(n)]
        sampled = self._model.function("multinomial_from_uniform")(probabilities, uniform, rows)
        arguments = (probabilities, order, rows, sampled, self._argument("top_prob_offsets", offsets, "i4"))
        own, top, tokens = (t.numpy() for t in self._model.function("sampler_take_probs")(*arguments))
        drawn: list[int] = sampled.numpy().tolist()
        np.testing.assert_array_equal(own, probabilities.numpy()[list(indices), drawn])
        np.testing.assert_array_equal(np.sort(probabilities.numpy())[:, ::-1], ordered.numpy())
        pairs = list(zip(tokens.tolist(), top.tolist(), strict=True))
        for entry, n in zip(entries, wanted, strict=True):
            entry.top.append(pairs[:n])
            del pairs[:n]
        return drawn

    def verify(
        self, probabilities: Any, entries: Sequence[Entry], drafts: Sequence[Sequence[int]], draft_probabilities: Any
    ) -> tuple[list[int], list[int]]:
        """Drafted tokens that are accepted, and the token behind them, for each; drafts are chains."""
        starts = np.cumsum([0, *(len(draft) + 1 for draft in drafts)])
        nodes, ends = int(starts[-1]), set((starts[1:] - 1).tolist())
        child = [-1 if i in ends else i + 1 for i in range(nodes)]
        uniform = [entry.random.random() for entry, draft in zip(entries, drafts, strict=True) for _ in (0, *draft)]
        reached = self._argument("parent_ptr", starts[:-1], "i4")
        self._model.function("sampler_verify_draft_tokens")(
            draft_probabilities,
            self._argument("draft_tokens", [t for draft in drafts for t in (0, *draft)], "i4"),
            probabilities,
            self._argument("first_child", child, "i4"),
            self._argument("next_sibling", [-1] * nodes, "i4"),
            self._argument("uniform", uniform, "f4"),
            reached,
        )
        last = self._argument("uniform", [_uniform(entry) for entry in entries], "f4")
        tokens = self._drawn(probabilities, last, reached)
        return (reached.numpy() - starts[:-1]).tolist(), tokens

    def _drawn(self, probabilities: Any, uniform: Any, rows: Any) -> list[int]:
        found: list[int] = (
            self._model.function("multinomial_from_uniform")(probabilities, uniform, rows).numpy().tolist()
        )
        return found


def _uniform(entry: Entry) -> float:
    """The next random number of a sequence, noted for tests."""
    entry.uniform.append(float(np.float32(entry.random.random())))
    return entry.uniform[-1]


class Engine:
    """The actions: hybrid prefill (decoding goes on within it), decoding, and verification of drafts."""

    def __init__(self, folder: Path, vm: Any, *, samples_on_device: bool = False) -> None:
        self.model = Model(folder, vm)
        self.processor = LogitProcessor(self.model)
        self._sampler = GpuSampler(self.model) if samples_on_device else CpuSampler()
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.calls: Counter[str] = Counter()
        self._ids = 0
        most = (DRAFT_SLOTS, self.model.vocab_size)
        self._storage, self._drafted = (tvm.runtime.empty(most, "float32") for _ in range(2))

    def add(self, request: Request, *, prefix_of: Entry | None = None, length: int = 0) -> list[Entry]:
        """Enqueues a request and returns its sequences.

        `length` tokens of it are those of `prefix_of`, as MLC's prefix cache finds out: a sequence that still runs
        is forked there, and one that is finished is taken over after popping the tokens behind.
        """
        entry = self._entry(request, request.seed)
        entry.inputs = request.prompt[length:]
        entry.children = [self._entry(request, request.seed + i) for i in range(request.n)] if request.n > 1 else []
        if prefix_of is None:
            self.model.add_sequence(entry.id)
        elif prefix_of.finished:
            held = len(prefix_of.request.prompt) + len(prefix_of.output) - 1
            entry.id = prefix_of.id
            self.model.state("popn", entry.id, held - length)
        else:
            self.model.state("fork_sequence", prefix_of.id, entry.id, length)
        if not entry.children and not (prefix_of and prefix_of.finished):
            self.model.slide(entry.id)
        self.waiting.append(entry)
        return entry.children or [entry]

    def reset(self) -> None:
        """Forgets every request."""
        self.waiting, self.running = [], []
        self.calls.clear()
        self.model.state("clear")

    def run(self) -> None:
        """Until all is done."""
        while self.waiting or self.running:
            self.step()

    def step(self) -> None:
        """One action."""
        if prompts := self._admitted():
            self._prefill(prompts)
        else:
            self._decode()
        self.running = [entry for entry in self.running if not entry.finished]

    def _admitted(self) -> list[tuple[Entry, list[int]]]:
        """Prompts, or what of them fits the chunk beside a token of each running sequence; a parent counts too."""
        found: list[tuple[Entry, list[int]]] = []
        room, sequences = self.model.chunk - len(self.running), len(self.running)
        for entry in self.waiting:
            sequences += 1 + len(entry.children)
            if room == 0 or sequences > min(self.model.max_sequences, self.model.chunk):
                break
            found.append((entry, entry.inputs[:room]))
            del entry.inputs[:room]
            room -= len(found[-1][1])
        return found

    def _entry(self, request: Request, seed: int) -> Entry:
        self._ids += 1
        return Entry(request, self._ids, [], np.random.default_rng(seed))

    def _prefill(self, prompts: Sequence[tuple[Entry, list[int]]]) -> None:
        """new_request_prefill.cc"""
        batch = [*((entry, entry.output[-1:]) for entry in self.running), *prompts]
        entries, parts = [entry for entry, _ in batch], [part for _, part in batch]
        lengths = [len(part) for part in parts]
        if len(batch) == 1:
            embeddings = self.model.token_embed(parts[0])
        for part, offset in zip(parts, np.cumsum([0, *lengths[:-1]]).tolist(), strict=True):
            if len(batch) > 1:
                embeddings = self.model.token_embed(part, offset)
        self.calls["prefill" if len(batch) == 1 else "batch_prefill"] += 1
        self.calls["hybrid"] += 0 < len(self.running) < len(batch)
        logits = self.model.batch_prefill(embeddings, [entry.id for entry in entries], lengths)
        self.waiting = [entry for entry in self.waiting if entry.inputs]
        indices, chosen = [], []
        for i, entry in enumerate(entries):
            if not entry.inputs:
                chosen += entry.children or [entry]
                indices += [i] * max(1, len(entry.children))
            if not entry.inputs and entry.children:
                for child in entry.children:
                    self.model.state("fork_sequence", entry.id, child.id, -1)
                    self.model.slide(child.id)
        self._sample(logits, entries, indices, chosen)
        known = {id(entry) for entry in self.running}
        self.running += [entry for entry in chosen if id(entry) not in known]

    def _decode(self) -> None:
        """batch_decode.cc"""
        entries = self.running
        embeddings = self.model.token_embed([entry.output[-1] for entry in entries])
        self.calls["decode" if len(entries) == 1 else "batch_decode"] += 1
        logits = self.model.batch_decode(embeddings, [entry.id for entry in entries])
        self._sample(logits, entries, list(range(len(entries))), entries)

    def _sample(self, logits: Any, entries: Sequence[Entry], indices: Sequence[int], chosen: Sequence[Entry]) -> None:
        """Processes the rows of `entries`, and draws a token for each of `chosen` from the row of its index."""
        rows: list[Row] = [(entry, ()) for entry in entries]
        logits = view(logits, (len(rows), self.model.vocab_size))
        self.processor.update(logits, rows)
        processed = logits.numpy().copy()
        probabilities = self.processor.probabilities(logits, rows)
        if not chosen:
            return
        top_p = [entry.request.top_p for entry in entries]
        tokens = self._sampler.sample(self._sampler.renormalized(probabilities, top_p), indices, chosen)
        for entry, index, token in zip(chosen, indices, tokens, strict=True):
            entry.rows.append(processed[index])
            entry.output.append(token)

    def verify(self, drafts: Sequence[Sequence[int]], proposed: Sequence[F32]) -> list[int]:
        """batch_verify.cc on chains: drafts of the running sequences, and (length, V) what they were drawn from.

        Returns how many of each were accepted.
        """
        entries, lengths = self.running, [len(draft) + 1 for draft in drafts]
        slots = np.arange(1, sum(map(len, drafts)) + 1, dtype=np.int32)
        index = self.model.argument("slots", slots, DRAFT_SLOTS)
        self.model.function("scatter_probs")(tvm.runtime.tensor(np.concatenate(proposed)), index, self._storage)
        ends = iter(slots.tolist())
        of_nodes = np.array([slot for draft in drafts for slot in (0, *(next(ends) for _ in draft))], np.int32)
        gathered = view(self._drafted, (len(of_nodes), self.model.vocab_size))
        index = self.model.argument("slots", of_nodes, DRAFT_SLOTS)
        self.model.function("gather_probs")(self._storage, index, gathered)
        tokens = [t for entry, draft in zip(entries, drafts, strict=True) for t in (entry.output[-1], *draft)]
        parents = [i - 1 for length in lengths for i in range(length)]
        ids = [entry.id for entry in entries]
        self.calls["batch_verify"] += 1
        logits = self.model.batch_verify(self.model.token_embed(tokens), ids, lengths, parents)
        rows: list[Row] = [(e, d[:i]) for e, d in zip(entries, drafts, strict=True) for i in range(len(d) + 1)]
        logits = view(logits, (len(rows), self.model.vocab_size))
        self.processor.update(logits, rows)
        processed = logits.numpy().copy()
        probabilities = self.processor.probabilities(logits, rows)
        probabilities = self._sampler.renormalized(probabilities, [entry.request.top_p for entry, _ in rows])
        accepted, last = self._sampler.verify(probabilities, entries, drafts, gathered)
        start = 0
        for entry, draft, count, token in zip(entries, drafts, accepted, last, strict=True):
            entry.output += [*draft[:count], token]
            entry.rows += list(processed[start : start + count + 1])
            start += len(draft) + 1
        self.model.commit_tree_nodes(ids, accepted)
        return accepted
