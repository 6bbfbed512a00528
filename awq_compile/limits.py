"""`CompileOptions`: what a compiled library is dimensioned for, and the memory that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from awq_compile.errors import ArtifactError, UsageError

PAGE_SIZES: Final = (8, 16, 32, 64, 128)
DEFAULT_PAGE: Final = 16  # what the MLC engine creates caches with, unless its configuration says otherwise


@dataclass(frozen=True)
class CompileOptions:
    """Sizes in tokens and sequences, with the names of the MLC runtime.

    `page_size`: positions of a page of the KV cache. With `sliding_window_size` a sequence may grow without end,
    and `context_window_size` is that of the window: besides itself a token sees so many positions before it, the first
    `attention_sink_size` of the sequence among them (StreamingLLM, Xiao et al. 2023). That is transformers'
    `sliding_window` less one. TVM's cache slides between calls: a token of a longer prompt sees the window before its
    prefill chunk, and the chunk up to itself.

    `cuda_graphs`: on CUDA, decoding replays its kernels as graphs.
    """

    context_window_size: int
    prefill_chunk_size: int = 512
    max_batch_size: int = 8
    page_size: int = DEFAULT_PAGE
    sliding_window_size: int | None = None
    attention_sink_size: int = 0
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise UsageError(f"the page size must be one of {PAGE_SIZES}, got {self.page_size}", hint="--page-size 16")
        window, sink = self.sliding_window_size, self.attention_sink_size
        if window is None and sink:
            raise UsageError(
                f"an attention sink of {sink} tokens needs a sliding window", hint="--sliding-window-size 4096"
            )
        if window is not None and not 0 <= sink < window:
            raise UsageError(
                f"the attention sink has {sink} tokens and the sliding window {window}: the window must be larger"
            )
        if window is not None and self.prefill_chunk_size > window:
            raise UsageError(
                f"the prefill chunk of {self.prefill_chunk_size} tokens exceeds the sliding window of {window}",
                hint=f"--prefill-chunk-size {window}",
            )

    @property
    def cached_tokens(self) -> int:
        """Most positions that the KV cache keeps of one sequence."""
        if self.sliding_window_size is None:
            return self.context_window_size
        return self.sliding_window_size + self.prefill_chunk_size + 2 * self.page_size  # part pages at both ends

    def kv_cache_bytes(self, layers: int, kv_heads: int, head_dim: int, element_bytes: int) -> int:
        """Bytes of the keys and values of one sequence of full length, whole pages."""
        pages = -(-self.cached_tokens // self.page_size)
        return pages * self.page_size * 2 * layers * kv_heads * head_dim * element_bytes

    @staticmethod
    def read(data: Mapping[str, Any]) -> CompileOptions:
        """From a manifest's options, where other keys may lie too. Raises `ArtifactError` for anything mistyped."""
        found: dict[str, Any] = {}
        for field in fields(CompileOptions):
            value = data.get(field.name, field.default)
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ArtifactError(f"{field.name} is {value!r:.80}, expected true or false")
                found[field.name] = value
                continue
            optional = field.default is None and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ArtifactError(f"{field.name} is {value!r:.80}, expected a number of tokens or sequences")
            found[field.name] = value
        try:
            return CompileOptions(**found)
        except UsageError as error:
            raise ArtifactError(str(error)) from None

    def runtime_keys(self) -> dict[str, int]:
        """The keys of mlc-chat-config.json and of a library's metadata; -1 is their word for none."""
        return {
            "context_window_size": -1 if self.sliding_window_size else self.context_window_size,
            "sliding_window_size": self.sliding_window_size or -1,
            "attention_sink_size": self.attention_sink_size if self.sliding_window_size else -1,
            "prefill_chunk_size": self.prefill_chunk_size,
            "max_batch_size": self.max_batch_size,
        }
