"""Builds the floating-point decoder for this machine's CPU, and drives it: what its tests need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_ffi import Shape

from awq_compile.compiler import lower_passes, plan_passes, vm_passes, with_bounds
from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.models.config import ModelConfig, read_config
from awq_compile.models.decoder import export_decoder
from awq_compile.models.parameters import model_parameters

ANY_SCHEME = QuantScheme.parse("w4g32")  # the floating-point parameters do not depend on the scheme


def cpu_target() -> Any:
    """This machine's processor, with all its vector instructions."""
    features = tvm.get_global_func("target.llvm_get_system_cpu")()
    return tvm.target.Target({"kind": "llvm", "mcpu": str(features)})


def build(module: Any, captured: tuple[str, ...] = ()) -> Any:
    """A VM executable, by the compiler's passes without the quantising ones."""
    target = cpu_target()
    with target:
        module = tvm.transform.Sequential([*lower_passes(), *plan_passes(captured), *vm_passes()])(module)
        return relax.build(module, target=target, relax_pipeline=None)


def float_params(config: ModelConfig, state: dict[str, Any]) -> list[Any]:
    """The decoder's parameters from a transformers state dict, as TVM tensors."""
    arrays = [
        np.concatenate([state[source].float().numpy() for source in parameter.sources])
        for parameter in model_parameters(config, ANY_SCHEME)
    ]
    return [tvm.runtime.tensor(array) for array in arrays]


def save_hf_config(hf_config: Any, folder: Path, architecture: str) -> ModelConfig:
    """Writes config.json of a transformers configuration and reads it with our reader."""
    folder.mkdir(parents=True, exist_ok=True)
    data = hf_config.to_dict() | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(data))
    return read_config(folder)


class Float:
    """A compiled floating-point decoder with its weights and one KV cache."""

    def __init__(
        self, config: ModelConfig, state: dict[str, Any], sizes: CompileOptions, captured: tuple[str, ...] = ()
    ) -> None:
        """`captured` are functions that replay their kernels as CUDA graphs."""
        module, _ = export_decoder(config, sizes, "float32")
        executable = build(with_bounds(module, sizes) if captured else module, captured)
        self.vm = relax.VirtualMachine(executable, tvm.cpu())
        self.params = float_params(config, state)
        slides = int(sizes.sliding_window_size is not None)
        shape = (sizes.max_batch_size, sizes.cached_tokens, sizes.prefill_chunk_size, sizes.page_size, slides)
        self.cache = self.vm["create_tir_paged_kv_cache"](*(Shape([size]) for size in shape))

    def state(self, name: str, *arguments: Any) -> Any:
        """Calls `vm.builtin.kv_state_NAME` on the cache."""
        return tvm.get_global_func(f"vm.builtin.kv_state_{name}")(self.cache, *arguments)

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """(n, H)"""
        return self.vm["embed"](tvm.runtime.tensor(np.asarray(tokens, np.int32)), self.params).numpy()

    def __call__(
        self,
        name: str,
        sequences: dict[int, Sequence[int]],
        *,
        positions: Sequence[int] | None = None,
        tree: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Runs function `name` on new tokens of sequences (id → tokens); returns its first result.

        `tree` gives each token's parent among the new ones, -1 for none.
        """
        embeds = self.embed([token for tokens in sequences.values() for token in tokens])
        embeds = embeds[:, None] if name.startswith("batch_decode") else embeds[None]
        extra = [] if positions is None else [tvm.runtime.tensor(np.asarray(positions, np.int32))]
        lengths = Shape([len(tokens) for tokens in sequences.values()])
        self.state("begin_forward", Shape(list(sequences)), lengths, *([] if tree is None else [Shape(tree)]))
        result = self.vm[name](tvm.runtime.tensor(embeds), *extra, self.cache, self.params)
        self.state("end_forward")
        return result[0].numpy()
