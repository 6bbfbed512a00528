"""Built libraries in the hands of MLC's engine, as `helpers_mlc_engine` plays it, against transformers.

The reference is the ordinary transformers model with the weights that the codes stand for; what a request asks of its
logits, transformers' own logits processors do, and NumPy where it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from helpers_mlc_engine import Engine, Entry, Request, draw, load_vm
from helpers_models import DEMO, write_model
from tokenizers import Tokenizer
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from awq_compile.awq.checkpoint import open_checkpoint
from awq_compile.awq.dequantized import dequantized_model
from awq_compile.cli.main import main
from awq_compile.compiler import CompileContext
from awq_compile.manifest import Dist, open_dist
from awq_compile.models.parameters import model_parameters
from awq_compile.targets import resolve_target
from awq_compile.tuning.database import known_records
from awq_compile.verify.device_vm import device_vm
from awq_compile.verify.dist import compiled_from
from awq_compile.verify.whole_model import tolerance

LOWEST = np.finfo(np.float32).min
MASKED = -3.4e38  # OpenCL C gets the lowest float32 with seven digits
FLOAT32 = 2e-3  # of a logit


@dataclass
class Oracle:
    """A transformers model, and how far a logit may lie from its own."""

    model: Any
    tolerance: float

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """(T, V)"""
        with torch.inference_mode():
            found: np.ndarray = self.model(torch.tensor([list(tokens)])).logits[0].numpy()
        return found

    def generated(self, prompt: list[int], count: int) -> list[int]:
        """The greedy continuation."""
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            whole = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found: list[int] = whole[0, len(prompt) :].tolist()
        return found

    def processed(self, entry: Entry) -> np.ndarray:
        """(tokens put out, V): what each was to be drawn from, before softmax."""
        request, rows = entry.request, []
        raw = self.logits([*request.prompt, *entry.output])[len(request.prompt) - 1 : -1]
        for i, row in enumerate(raw):
            before = torch.tensor([entry.output[:i]], dtype=torch.int64)
            scores = torch.tensor(row)[None]
            if request.logit_bias:
                bias: Any = {(token,): value for token, value in request.logit_bias.items()}
                scores = SequenceBiasLogitsProcessor(bias)(before, scores)
            counts = torch.bincount(before[0], minlength=len(row))
            scores = scores - (counts > 0) * request.presence_penalty - counts * request.frequency_penalty
            if request.repetition_penalty != 1:
                scores = RepetitionPenaltyLogitsProcessor(request.repetition_penalty)(before, scores)
            found = scores[0].numpy().astype(np.float32)
            if request.allowed is not None:
                found = np.where(request.allowed(entry.output[:i]), found, LOWEST)
            rows.append(found)
        return np.stack(rows)

    def check(self, *entries: Entry) -> None:
        """Every logit that a token was drawn from, and the token."""
        for entry in entries:
            expected, found = self.processed(entry), np.stack(entry.rows)
            assert len(entry.output) == entry.request.max_tokens
            masked = expected == LOWEST
            np.testing.assert_array_equal(found < MASKED, masked)
            assert np.abs(np.where(masked, 0, found - expected)).max() <= self.tolerance
            if entry.request.temperature == 0:
                chosen = expected[np.arange(len(expected)), entry.output]
                assert (chosen >= expected.max(1) - 2 * self.tolerance).all()


@pytest.fixture(scope="module")
def reference(dist: Dist) -> Any:
    """The model of the checkpoint that the libraries were compiled from."""
    (checkpoint,) = (dist.path.parent / "cache" / "checkpoints").iterdir()
    return dequantized_model(open_checkpoint(checkpoint))


@pytest.fixture(scope="module")
def oracle(reference: Any) -> Oracle:
    return Oracle(reference, FLOAT32)


@pytest.fixture(scope="module")
def cpu(dist: Dist) -> Engine:
    return Engine(dist.path, load_vm(dist.library("cpu")))


@pytest.fixture
def engine(cpu: Engine) -> Engine:
    """With nothing in its cache."""
    cpu.reset()
    return cpu


@contextmanager
def on_device(dist: Dist, name: str) -> Iterator[Engine]:
    """The engine with a GPU library, whose kernels run on this machine."""
    target, (config, scheme, options) = resolve_target(name), compiled_from(dist)
    context = CompileContext(config, scheme, target, options, tuple(model_parameters(config, scheme)), known_records())
    with device_vm(dist.library(name), context) as device:
        yield Engine(dist.path, device.vm, samples_on_device=name == "vulkan")


@pytest.fixture(scope="module")
def text(dist: Dist) -> Callable[[int, int], list[int]]:
    """Tokens of the held-out text: `count` of them from a position on."""
    tokenizer = Tokenizer.from_file(str(dist.path / "tokenizer.json"))
    ids = tokenizer.encode((DEMO / "heldout.txt").read_text(encoding="utf-8")[:3000]).ids

    def part(at: int, count: int) -> list[int]:
        return list(ids[at : at + count])

    return part


def even(output: Sequence[int]) -> np.ndarray:
    """A grammar: after an even count of tokens even ones may follow, else odd ones; none of the last 100."""
    allowed: np.ndarray = np.arange(4096) % 2 == len(output) % 2
    allowed[-100:] = False
    return allowed


def requests(text: Callable[[int, int], list[int]]) -> list[Request]:
    """Of every kind, from one token to more than two chunks of 32."""
    return [
        Request(text(0, 5), 20),
        Request(text(30, 70), 12, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3),
        Request(text(120, 33), 10, logit_bias={13: 6.0, 4095: -3.0, 17: 2.5}, repetition_penalty=0.8),
        Request(text(200, 1), 16, allowed=even, frequency_penalty=-0.3),
        Request(text(210, 18), 9, n=3, temperature=0.9, top_p=0.8, presence_penalty=-0.2, seed=3),
        Request(text(240, 40), 14, temperature=1.3, allowed=even, logit_bias={8: 1.0}, top_logprobs=4),
    ]


def test_concurrent_requests(engine: Engine, oracle: Oracle, text: Callable[[int, int], list[int]]) -> None:
    """Six that come one after the other: chunks, batches, decoding within prefill; and what is left at the end."""
    free = engine.model.available_pages()
    entries = []
    for request in requests(text):
        entries += engine.add(request)
        engine.step()
    engine.run()
    oracle.check(*entries)
    assert 13 in entries[2].output[:-1]  # both bias and penalties change it, and their order shows
    assert entries[0].output == oracle.generated(entries[0].request.prompt, 20)
    assert {"prefill", "batch_prefill", "hybrid", "decode", "batch_decode"} <= set(+engine.calls)
    assert engine.model.available_pages() < free
    engine.reset()
    assert engine.model.available_pages() == free
    check_sampled(*entries)


def check_sampled(*entries: Entry) -> None:
    """Tokens follow from the logits they were drawn from, by a softmax in double precision, and the random number."""
    for entry in entries:
        if entry.request.temperature > 0:
            _check_sampled(entry, entry.request)


def _check_sampled(entry: Entry, request: Request) -> None:
    for row, token, uniform in zip(entry.rows, entry.output, entry.uniform, strict=True):
        probabilities = np.exp((row.astype(np.float64) - row.max()) / request.temperature)
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        kept = np.zeros(len(row), bool)
        kept[order[: 1 + int(np.argmax(np.cumsum(probabilities[order]) >= request.top_p - 1e-5))]] = True
        kept |= probabilities >= probabilities[kept].min()
        probabilities = np.where(kept, probabilities, 0) / probabilities[kept].sum()
        near = {draw(probabilities, min(max(uniform + d, 0), 1 - 1e-9)) for d in (-1e-4, 0, 1e-4)}
        assert token in near
    for row, top in zip(entry.rows, entry.top, strict=bool(request.top_logprobs)):
        assert [t for t, _ in top] == np.argsort(-row, kind="stable")[: request.top_logprobs].tolist()


def test_greedy_ties(engine: Engine) -> None:
    """Temperature 0 gives each of the maxima 1/count, in one row of a batch."""
    logits = np.random.default_rng(1).normal(size=(3, 4096)).astype(np.float32)
    logits[1, [7, 4095, 100]] = 9.0
    rows = [
        (Entry(Request([0], temperature=t), i, [], np.random.default_rng(0)), ()) for i, t in enumerate((1.0, 0.0, 0.0))
    ]
    found = engine.processor.probabilities(tvm.runtime.tensor(logits), rows).numpy()
    assert np.flatnonzero(found[1]).tolist() == [7, 100, 4095] and (found[1, [7, 100, 4095]] == np.float32(1 / 3)).all()
    assert found[2, logits[2].argmax()] == 1 and found[2].sum() == 1
    wide = np.exp(logits[0].astype(np.float64))
    np.testing.assert_allclose(found[0], wide / wide.sum(), rtol=1e-5)


def test_prefix_cache(engine: Engine, oracle: Oracle, text: Callable[[int, int], list[int]]) -> None:
    """A running sequence forked in the middle of a page, and a finished one popped and gone on from."""
    (first,) = engine.add(Request(text(0, 45), 12))
    while len(first.output) < 3:
        engine.step()
    (forked,) = engine.add(Request([*text(0, 21), *text(300, 14)], 9), prefix_of=first, length=21)
    engine.run()
    held = [*text(0, 45), *first.output[:4]]
    (again,) = engine.add(Request([*held, *text(400, 3)], 7), prefix_of=first, length=len(held))
    (beside,) = engine.add(Request(text(500, 9), 5))
    engine.run()
    oracle.check(first, forked, again, beside)


def speculate(engine: Engine, oracle: Oracle, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """Drafts of three tokens, the greedy ones but for one mistake in some; returns how many were accepted."""
    entries = [e for prompt in prompts for e in engine.add(Request(prompt, count, repetition_penalty=1.1))]
    while engine.waiting:
        engine.step()
    found, rounds = [], 0
    while all(len(entry.output) + 4 <= count for entry in entries):
        drafts, wrong = [], [rounds % 4, (rounds + 2) % 4]
        for entry, at in zip(entries, wrong, strict=True):
            draft: list[int] = []
            for _ in range(3):
                probe = Entry(entry.request, 0, [], entry.random, output=[*entry.output, *draft, 0])
                draft.append(int(oracle.processed(probe)[-1].argmax()))
            drafts.append([(t + 1) % 4096 if i == at else t for i, t in enumerate(draft)])
        rows = [np.eye(4096, dtype=np.float32)[draft] for draft in drafts]
        found.append(engine.verify(drafts, rows))
        assert found[-1] == wrong
        rounds += 1
    for entry in entries:
        entry.request.max_tokens = len(entry.output)
    oracle.check(*entries)
    return found


def test_speculation(engine: Engine, oracle: Oracle, text: Callable[[int, int], list[int]]) -> None:
    """What is accepted ends at the mistake, and what is rejected leaves no trace in the cache."""
    assert len(speculate(engine, oracle, [text(0, 20), text(50, 9)], 20)) > 3
    assert engine.calls["batch_verify"] > 3


@pytest.mark.parametrize("name", ["opencl", "vulkan"])
def test_on_a_device(dist: Dist, reference: Any, text: Callable[[int, int], list[int]], name: str) -> None:
    """The same in half precision through the device's kernels; on Vulkan its own sampler draws."""
    config, *_ = compiled_from(dist)
    with on_device(dist, name) as engine:
        entries = []
        for request in requests(text)[1:]:
            request.prompt, request.max_tokens = request.prompt[:40], 2
            entries += engine.add(request)
            engine.step()
        engine.run()
        scale = max(float(np.abs(row[row > MASKED]).max()) for entry in entries for row in entry.rows)
        oracle = Oracle(reference, tolerance(config.num_layers, "float16") * scale)
        oracle.check(*entries)
        check_sampled(*entries)
        assert engine.calls["hybrid"] and engine.calls["batch_decode"]
        engine.reset()
        speculate(engine, oracle, [text(0, 6), text(50, 4)], 5)


def test_sliding_window(tmp_path: Path, unverified: None, text: Callable[[int, int], list[int]]) -> None:
    """Sequences grow far beyond the window, and their forks too.

    The runtime slides between calls only, so that chunks behind the first window see more than transformers do, and
    never lets go of whole pages that forks share: prompts here are shorter.
    """
    changed = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 33}
    model, out = write_model(tmp_path / "model", **changed), tmp_path / "dist"
    limits = "--method rtn --sliding-window-size 32 --prefill-chunk-size 16 --max-batch-size 4"
    assert main([str(model), "-o", str(out), *limits.split()]) == 0
    (checkpoint,) = (tmp_path / "cache" / "checkpoints").iterdir()
    engine = Engine(out, load_vm(open_dist(out).library("cpu")))
    assert engine.model.sliding_window == 32
    entries = [*engine.add(Request(text(0, 30), 40)), *engine.add(Request(text(60, 7), 45))]
    entries += engine.add(Request(text(80, 10), 30, n=2, temperature=1.0))
    engine.run()
    Oracle(dequantized_model(open_checkpoint(checkpoint)), FLOAT32).check(*entries)
