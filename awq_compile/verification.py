"""After packaging: a CPU library's logits against torch's on the same dequantised weights, a GPU's kernels singly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from awq_compile.awq.checkpoint import QuantizedModel
    from awq_compile.targets.base import TargetSpec
    from awq_compile.verify.kernels import KernelVerification

TOLERANCE: Final = 2e-3  # largest difference of a float32 logit
TOKENS: Final = 48  # enough to cross KV cache pages of 16
_HEADROOM: Final = 0.7  # of the free memory, for torch's float32 copy of the model


@dataclass(frozen=True)
class Verification:
    """Outcome for one library. `reason` says why it did not run."""

    ran: bool
    reason: str = ""
    tokens: int = 0
    max_difference: float = 0.0
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether it ran and stayed within the tolerance (a NaN does not)."""
        return self.ran and self.max_difference <= self.tolerance

    def words(self) -> str:
        """For people."""
        if not self.ran:
            return f"not verified: {self.reason}"
        if not self.passed:
            return (
                f"its logits differ from torch's by {self.max_difference:.3g} (at most {self.tolerance:.0e} is allowed)"
            )
        return f"logits within {self.max_difference:.1e} of torch's over {self.tokens} tokens"

    def to_json(self) -> dict[str, Any]:
        """For the report: the difference rounded up to 1, 2 or 5 times a power of ten, equal between equal runs."""
        if not self.ran:
            return {"ran": False, "reason": self.reason}
        bound = round_up(self.max_difference)
        return {
            "ran": True,
            "passed": self.passed,
            "tokens": self.tokens,
            "at_most": bound,
            "tolerance": self.tolerance,
        }


def round_up(value: float) -> float:
    """The next of …, 0.1, 0.2, 0.5, 1, 2, 5, 10, … that is not below `value`."""
    if value <= 0 or not math.isfinite(value):
        return 0.0 if value == 0 else math.inf
    exponent = math.floor(math.log10(value))
    steps = [float(f"{factor}e{exponent}") for factor in (1, 2, 5)] + [float(f"1e{exponent + 1}")]
    return next(step for step in steps if step >= value)


def verify_library(dist_dir: Path, model: QuantizedModel, target: TargetSpec) -> Verification | KernelVerification:
    """Compares with torch what runs here, prefill and decode, every logit; and with float64 every device kernel."""
    if target.has_device_code:
        return _verify_kernels(dist_dir, model, target)
    if (reason := cannot_run(target)) is not None:
        return Verification(ran=False, reason=reason)
    if (reason := _too_large(model)) is not None:
        return Verification(ran=False, reason=reason)
    from awq_compile.evaluate import dequantized_model, torch_logits
    from awq_compile.runtime.engine import Engine

    engine = Engine(dist_dir, target=target.name)
    count = min(TOKENS, model.config.context_window_size, engine.attention_window)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, count)
    expected = torch_logits(dequantized_model(model))(tokens)
    found = engine.logits(tokens)
    worst = float(np.max(np.abs(found.astype(np.float64) - expected)))
    return Verification(ran=True, tokens=count, max_difference=worst if math.isfinite(worst) else math.inf)


def _verify_kernels(dist_dir: Path, model: QuantizedModel, target: TargetSpec) -> Verification | KernelVerification:
    """Where this machine has what it takes, and in bearable time."""
    from awq_compile.manifest import open_dist
    from awq_compile.verify.dist import verify_target
    from awq_compile.verify.execution import missing, too_slow

    if (reason := missing(target)) is not None:
        return Verification(ran=False, reason=reason)
    if (reason := too_slow(model.config, target)) is not None:
        return Verification(ran=False, reason=f"{reason}; awq-compile verify does it")
    return verify_target(open_dist(dist_dir), target)


def cannot_run(target: TargetSpec) -> str | None:
    """Why this machine cannot run a library for `target`; None when it can."""
    return None if target.runs_here else f"this machine does not run {target.name}"


def _too_large(model: QuantizedModel) -> str | None:
    """Why torch's float32 copy does not fit into memory; None when it does."""
    import psutil

    from awq_compile.models.parameters import model_parameters

    needed = 4 * sum(math.prod(p.shape) for p in model_parameters(model.config, model.scheme))
    free = psutil.virtual_memory().available
    if needed > _HEADROOM * free:
        return f"torch needs {needed / 1e9:.1f} GB for the float32 model, and {free / 1e9:.1f} GB are free"
    return None
