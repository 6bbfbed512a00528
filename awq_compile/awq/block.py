"""Decoder layers of transformers, one at a time: the independent implementation that calibration runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from awq_compile.errors import ModelError
from awq_compile.models.config import ModelConfig

CHUNK_TOKENS: Final = 4096  # tokens that run through a layer at once


def _module(config: ModelConfig, kind: str) -> Any:
    return importlib.import_module(f"transformers.models.{config.model_type}.{kind}_{config.model_type}")


def _prefix(config: ModelConfig) -> str:
    return config.architecture.hf_name.removesuffix("ForCausalLM")


def hf_config(config: ModelConfig, model_dir: Path) -> Any:
    """The transformers configuration, set to full attention: the context never exceeds a sliding window."""
    try:
        found = getattr(_module(config, "configuration"), f"{_prefix(config)}Config").from_pretrained(
            model_dir, local_files_only=True
        )
    except Exception as problem:  # transformers and its strict dataclasses raise many kinds
        raise ModelError(f"{model_dir / 'config.json'}: transformers refuses it: {problem!s:.300}") from None
    found._attn_implementation = "sdpa"
    found.head_dim = config.head_dim
    found.tie_word_embeddings = config.tie_word_embeddings
    return found


def model_class(config: ModelConfig, model_dir: Path) -> tuple[Any, Any]:
    """(…ForCausalLM class, its configuration)."""
    return getattr(_module(config, "modeling"), config.architecture.hf_name), hf_config(config, model_dir)


def final_norm(config: ModelConfig, hf: Any, weight: torch.Tensor) -> nn.Module:
    """The norm before the LM head."""
    norm: nn.Module = getattr(_module(config, "modeling"), f"{_prefix(config)}RMSNorm")(
        config.hidden_size, eps=hf.rms_norm_eps
    )
    norm.load_state_dict({"weight": weight}, assign=True)
    return norm.requires_grad_(False)


class _Captured(Exception):
    """Stops a forward pass once the input that was asked for is known."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Block:
    """One decoder layer in float32, for windows of one length, positions from 0."""

    def __init__(self, config: ModelConfig, hf: Any, tensors: dict[str, torch.Tensor], length: int) -> None:
        modeling = _module(config, "modeling")
        with torch.device("meta"):
            layer = getattr(modeling, f"{_prefix(config)}DecoderLayer")(hf, 0)
        layer.load_state_dict(tensors, assign=True, strict=True)
        self.layer: Any = layer.eval().requires_grad_(False)
        rotary = getattr(modeling, f"{_prefix(config)}RotaryEmbedding")(hf)
        self._positions = rotary(torch.empty(1), torch.arange(length)[None])
        self.windows = max(1, CHUNK_TOKENS // length)

    def linear(self, name: str) -> nn.Linear:
        """The linear called `name` within the layer."""
        found = self.layer.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    def chunks(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """(B, T, H) hidden states in pieces of some windows."""
        yield from torch.split(hidden, self.windows)

    @contextmanager
    def replaced(self, values: dict[str, torch.Tensor]) -> Iterator[None]:
        """The layer with other values of some parameters, within the block of `with`."""
        parameters = dict(self.layer.named_parameters())
        kept = {name: parameters[name].data for name in values}
        try:
            for name, value in values.items():
                parameters[name].data = value
            yield
        finally:
            for name, value in kept.items():
                parameters[name].data = value

    def set(self, values: dict[str, torch.Tensor]) -> None:
        """Other values of some parameters, for good."""
        parameters = dict(self.layer.named_parameters())
        for name, value in values.items():
            parameters[name].data = value

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        found = self.layer(x, position_embeddings=self._positions)
        return found if isinstance(found, torch.Tensor) else found[0]

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the attention block, without the residual."""
        found: torch.Tensor = self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(x), position_embeddings=self._positions, attention_mask=None
        )[0]
        return found

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the MLP, norm included, without the residual; `x` is the sum of hidden states and attention."""
        found: torch.Tensor = self.layer.mlp(self.layer.post_attention_layernorm(x))
        return found

    def input_of(self, linear: str, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """What `linear` reads while `run(x)` runs, which stops there."""

        def stop(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            raise _Captured(args[0])

        hook = self.linear(linear).register_forward_pre_hook(stop)
        try:
            run(x)
        except _Captured as captured:
            return captured.value
        finally:
            hook.remove()
        raise AssertionError(f"{linear} was not reached")
