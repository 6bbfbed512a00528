"""Perplexity and KL divergence over windows of a text, of anything that maps tokens to logits.

Tokens t_1 … t_T of a window are scored without context from other windows: the mean over i of
-log p(t_{i+1} | t_1 … t_i), T - 1 predictions. Perplexity is exp of the mean over windows. The divergence is
KL(p_reference || p_candidate), mean over the same positions. Two candidates are compared by the per-window
differences, paired, with the standard error of their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from awq_compile.awq.dequantized import dequantized_model
from awq_compile.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Logits",
    "PairedDifference",
    "WindowScores",
    "dequantized_model",
    "original_model",
    "paired_difference",
    "score",
    "text_windows",
    "torch_logits",
]

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Logits = Callable[[I64], F32]  # (T,) token ids → (T, V) logits


@dataclass(frozen=True)
class WindowScores:
    """Per window: mean negative log-likelihood in nats, and mean KL divergence from the reference."""

    nll: F64
    kl: F64

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(float(self.nll.mean()))

    @property
    def mean_kl(self) -> float:
        """Mean divergence from the reference, in nats per token."""
        return float(self.kl.mean())


@dataclass(frozen=True)
class PairedDifference:
    """Mean over windows of nll(a) - nll(b) in nats, and the standard error of that mean."""

    mean: float
    standard_error: float


def paired_difference(a: WindowScores, b: WindowScores) -> PairedDifference:
    """How much worse `a` is than `b`, on the same windows."""
    difference = a.nll - b.nll
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return PairedDifference(float(difference.mean()), error)


def text_windows(text: Path | str, model_dir: Path, length: int, most: int | None = None) -> I64:
    """(windows, length) token ids of a text file (or of the text itself), in order, the tail dropped."""
    from awq_compile.awq.calibrate import load_tokenizer, read_text

    content = read_text(text) if isinstance(text, Path) else text
    ids = np.asarray(load_tokenizer(model_dir)(content, False), np.int64)
    count = len(ids) // length
    if not count:
        what = text if isinstance(text, Path) else "the text"
        raise CalibrationError(f"{what} has {len(ids)} tokens, and one window needs {length}", hint="a longer text")
    return ids[: count * length].reshape(count, length)[:most]


def _log_softmax(logits: F32) -> F32:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float32)


def score(
    candidates: Mapping[str, Logits], windows: Iterable[I64], reference: str | None = None
) -> dict[str, WindowScores]:
    """Scores every candidate on every window; `reference` names the one that KL is measured from (the first)."""
    names = list(candidates)
    base = reference or names[0]
    order = [base, *(name for name in names if name != base)]
    nll: dict[str, list[float]] = {name: [] for name in names}
    kl: dict[str, list[float]] = {name: [] for name in names}
    for tokens in windows:
        expected: F32 | None = None
        for name in order:
            found = _log_softmax(np.asarray(candidates[name](tokens), np.float32)[:-1])
            nll[name].append(-float(np.take_along_axis(found, tokens[1:, None], 1).mean(dtype=np.float64)))
            if expected is None:
                expected, weights = found, np.exp(found)
            kl[name].append(float((weights * (expected - found)).sum(-1).mean(dtype=np.float64)))
    return {name: WindowScores(np.asarray(nll[name]), np.asarray(kl[name])) for name in names}


def original_model(model_dir: Path) -> PreTrainedModel:
    """The floating-point model of a Hugging Face directory, float32, read through our checks."""
    from awq_compile.awq.dequantized import float_model

    return float_model(model_dir)


def torch_logits(model: Any) -> Logits:
    """A transformers model as tokens → logits."""
    import torch

    def logits(tokens: I64) -> F32:
        with torch.inference_mode():
            found = model(torch.from_numpy(np.ascontiguousarray(tokens))[None], use_cache=False).logits[0]
        return np.asarray(found.numpy(), np.float32)

    return logits
