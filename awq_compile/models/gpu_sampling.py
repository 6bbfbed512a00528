"""The functions with which the MLC runtime samples on the device: on CUDA, Vulkan and Metal it demands them.

Elsewhere it copies probabilities to the host. Shapes: b rows of V probabilities, k samples, each of row
`sample_indices[i]`, m nodes of draft trees, p positions.
"""

from __future__ import annotations

from typing import Any, Final

from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.script.ir_builder import tirx as T

from awq_compile.kernels.elementwise import every
from awq_compile.kernels.sampler.block import THREADS, function
from awq_compile.kernels.sampler.draw import draw, draw_top_p
from awq_compile.kernels.sampler.renormalize import renormalize_top_p
from awq_compile.kernels.sampler.sort import sort_rows
from awq_compile.kernels.sampler.verify_drafts import verify_drafts
from awq_compile.targets.base import TargetSpec

_KINDS: Final = ("cuda", "vulkan", "metal")  # `Sampler::SupportGPUSampler` in MLC's cpp/serve/sampler/sampler.h


def samples_on_device(target: TargetSpec) -> bool:
    """Whether the runtime looks these functions up in a library for `target`."""
    return target.tvm_target["kind"] in _KINDS


class GpuSampler(nn.Module):  # type: ignore[misc]
    """Methods are the functions of the library; `specs` has their arguments."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def multinomial_from_uniform(self, probs: Tensor, uniform_samples: Tensor, sample_indices: Tensor) -> Tensor:
        """(b, V), (k,) in [0, 1), (k,) int32 → (k,) int32."""
        kernel = draw("tir_multinomial_from_uniform", self.vocab_size)
        return _call(kernel, [probs, uniform_samples, sample_indices], (sample_indices.shape, "int32"))

    def argsort_probs(self, probs: Tensor) -> tuple[Tensor, ...]:
        """(b, V) → the same, descending, and (b, V) int32, where they come from; equal ones keep their order."""
        kernel = sort_rows("tir_argsort_probs", self.vocab_size)
        return tuple(_call(kernel, [probs], (probs.shape, "float32"), (probs.shape, "int32")))

    def sample_with_top_p(
        self,
        sorted_probs: Tensor,
        sorted_indices: Tensor,
        uniform_samples: Tensor,
        sample_indices: Tensor,
        top_p: Tensor,
    ) -> Tensor:
        """What `argsort_probs` gives, (k,), (k,) int32, (b,) → (k,) int32, among the fewest that reach top_p."""
        kernel = draw_top_p("tir_sample_with_top_p", self.vocab_size)
        arguments = [sorted_probs, sorted_indices, uniform_samples, sample_indices, top_p]
        return _call(kernel, arguments, (sample_indices.shape, "int32"))

    def sampler_take_probs(
        self,
        unsorted_probs: Tensor,
        sorted_indices: Tensor,
        sample_indices: Tensor,
        sampling_result: Tensor,
        top_prob_offsets: Tensor,
    ) -> tuple[Tensor, ...]:
        """(b, V), (b, V) int32, (k,) int32, (k,) int32, (p,) int32 → (k,), (p,), (p,) int32.

        Probabilities of the drawn tokens, and of those at offsets row * V + rank, with their numbers.
        """
        k, p = sample_indices.shape, top_prob_offsets.shape
        arguments = [unsorted_probs, sorted_indices, sample_indices, sampling_result, top_prob_offsets]
        return tuple(_call(_take_probs(self.vocab_size), arguments, (k, "float32"), (p, "float32"), (p, "int32")))

    def renormalize_by_top_p(self, probs: Tensor, top_p: Tensor, init_pivots: Tensor) -> Tensor:
        """(b, V), (b,), (b, 3) → (b, V). The pivots are where MLC's own search starts; ours needs none."""
        del init_pivots
        kernel = renormalize_top_p("tir_renormalize_by_top_p", self.vocab_size)
        return _call(kernel, [probs, top_p], (probs.shape, "float32"))

    def specs(self) -> dict[str, dict[str, Any]]:
        """Function → argument → spec. No size has a bound: drafts come in more rows than there are sequences."""
        spec, v = nn.spec.Tensor, self.vocab_size
        probs, indices = spec(["rows", v], "float32"), spec(["rows", v], "int32")
        samples = {"uniform_samples": spec(["samples"], "float32"), "sample_indices": spec(["samples"], "int32")}
        top_p = spec(["rows"], "float32")
        return {
            "multinomial_from_uniform": {"probs": probs, **samples},
            "argsort_probs": {"probs": probs},
            "sample_with_top_p": {"sorted_probs": probs, "sorted_indices": indices, **samples, "top_p": top_p},
            "sampler_take_probs": {
                "unsorted_probs": probs,
                "sorted_indices": indices,
                "sample_indices": samples["sample_indices"],
                "sampling_result": spec(["samples"], "int32"),
                "top_prob_offsets": spec(["positions"], "int32"),
            },
            "renormalize_by_top_p": {"probs": probs, "top_p": top_p, "init_pivots": spec(["rows", 3], "float32")},
        }


def inplace_sampler_kernels(vocab_size: int) -> dict[str, Any]:
    """Global symbol → PrimFunc that writes into its arguments and is called as it is."""
    name = "sampler_verify_draft_tokens"
    return {name: verify_drafts(name, vocab_size)}


def _call(kernel: Any, arguments: list[Tensor], *results: tuple[Any, str]) -> Any:
    """Calls a PrimFunc whose last arguments are its results, of the given shapes and types."""
    out = [Tensor.placeholder(list(shape), dtype) for shape, dtype in results]
    name = str(kernel.attrs["global_symbol"])
    return op.tensor_ir_op(kernel, name, arguments, out if len(out) > 1 else out[0])


def _take_probs(vocab_size: int) -> Any:
    """Both takes in one launch, for one of them may be of nothing."""
    b, k, p = (tirx.Var(name, "int32") for name in "bkp")
    arguments = {
        "unsorted_probs": ((b, vocab_size), "float32"),
        "sorted_indices": ((b, vocab_size), "int32"),
        "sample_indices": ((k,), "int32"),
        "sampling_result": ((k,), "int32"),
        "top_prob_offsets": ((p,), "int32"),
        "sampled_probs": ((k,), "float32"),
        "top_probs": ((p,), "float32"),
        "top_indices": ((p,), "int32"),
    }
    with function("tir_sampler_take_probs", arguments) as (builder, buffers):
        probs, indices, rows, tokens, offsets, sampled_probs, top_probs, top_indices = buffers
        with every(T.max(k, p), THREADS) as i:
            with T.If(i < k), T.Then():
                T.buffer_store(sampled_probs, probs[rows[i], tokens[i]], [i])
            with T.If(i < p), T.Then():
                row = T.bind(offsets[i] // vocab_size)
                token = T.bind(indices[row, offsets[i] % vocab_size])
                T.buffer_store(top_probs, probs[row, token], [i])
                T.buffer_store(top_indices, token, [i])
    return builder.get()
