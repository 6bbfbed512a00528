"""One decoder layer: search scales, fold them, check the folding, round each linear, propagate.

    search     on the floating-point layer and up to `SEARCH_WINDOWS` windows: a scale for every `ScaleGroup`
    fold       s into the linear's columns, 1/s into the norm or the rows of the projection before it
    check      the folded floating-point layer still computes the original's output
    round      group by group in forward order, with H of the inputs that the rounded layer really produces
    propagate  the rounded layer's output is the next layer's input

What is kept is decided by the output error of the group's scope: round-to-nearest, AWQ, or AWQ refined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch

from awq_compile.awq.block import Block
from awq_compile.awq.checkpoint import LinearReport
from awq_compile.awq.clip import search_range
from awq_compile.awq.refine import Refined, plain, refine
from awq_compile.awq.rounding import Grid, decode, plain_grid, round_to
from awq_compile.awq.search import CHECK_MACS, Choice, quadratic, search_scale, some_rows
from awq_compile.errors import CompileError
from awq_compile.formats import QuantSpec
from awq_compile.models.architectures import ScaleGroup
from awq_compile.models.config import ModelConfig

SEARCH_WINDOWS: Final = 16
SCOPE_WINDOWS: Final = 8  # windows on which variants of a group are compared by their scope's output
_KEPT_BYTES: Final = 256 << 20  # inputs of a linear up to this size are kept, larger ones computed again
FOLD_TOLERANCE: Final = 1e-4
Run = Callable[[torch.Tensor], torch.Tensor]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class QuantizedLayer:
    """Codes and grid of every linear, every other tensor, reports, and the next layer's input."""

    linears: dict[str, Refined]
    vectors: Tensors
    reports: list[LinearReport]


def spread(count: int, most: int) -> list[int]:
    """Up to `most` indices below `count`, evenly spaced."""
    return [i * count // min(most, count) for i in range(min(most, count))]


def gram_of(inputs: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """H = Σ x xᵀ (K, K), and E|x| (K,)."""
    gram = mean_abs = None
    tokens = 0
    for x in inputs:
        flat = x.reshape(-1, x.shape[-1])
        tokens += flat.shape[0]
        if gram is None or mean_abs is None:
            gram, mean_abs = flat.T @ flat, flat.abs().sum(0)
        else:
            gram.addmm_(flat.T, flat)
            mean_abs += flat.abs().sum(0)
    assert gram is not None and mean_abs is not None
    return gram, mean_abs / tokens


def heads_of(group: ScaleGroup, config: ModelConfig) -> tuple[int, int] | None:
    """(query heads, KV heads) where the group reads attention's output, whose channels share V's scales."""
    return (config.num_heads, config.num_kv_heads) if group.fold_into.endswith("v_proj") else None


def kv_rows(scale: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """(heads*D,) scales of o_proj's inputs, equal for all query heads of a KV head → (kv_heads*D,) rows of v_proj."""
    query, kv = heads
    return scale.reshape(kv, query // kv, -1)[:, 0].reshape(-1)


def exact_in_float16(norm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scales near `scale` for which norm / s is a float16, so that folding into a stored norm loses nothing."""
    folded = (norm / scale).half().float()
    usable = (folded.abs() >= 2.0**-14) & torch.isfinite(folded)
    return torch.where(usable, norm / torch.where(usable, folded, 1.0), 1.0)


def fold(tensors: Tensors, group: ScaleGroup, scale: torch.Tensor, config: ModelConfig) -> Tensors:
    """The tensors that change when `scale` (K,) multiplies the group's columns and its inverse goes before them."""
    changed = {f"{name}.weight": tensors[f"{name}.weight"] * scale for name in group.linears}
    source = f"{group.fold_into}.weight"
    if tensors[source].ndim == 1:
        changed[source] = tensors[source] / scale
        return changed
    heads = heads_of(group, config)
    rows = scale if heads is None else kv_rows(scale, heads)
    base = changed.get(source, tensors[source])
    changed[source] = base / rows[:, None]
    if (bias := f"{group.fold_into}.bias") in tensors:
        changed[bias] = tensors[bias] / rows
    return changed


@dataclass(frozen=True)
class _Variant:
    """One way to round a group: its codes, and the values they stand for in the original's coordinates."""

    kept: str
    scale: torch.Tensor  # (K,) of the stacked columns
    rounded: Refined
    effective: torch.Tensor  # (N, K): Q(W·scale / rows)·rows / scale


class LayerQuantizer:
    """Quantises one layer, given its hidden states (B, T, H).

    The block stays in the original's coordinates: a rounded linear is put back as Q·rows / scale, which is what
    the folded one computes. So inputs, Gram matrices and outputs never change their scale while groups are rounded.
    """

    def __init__(self, block: Block, tensors: Tensors, config: ModelConfig, spec: QuantSpec, name: str) -> None:
        self.block, self.config, self.spec, self.name = block, config, spec, name
        self.original = tensors
        self.folded = dict(tensors)
        self.choices: dict[str, Choice] = {}
        self.linears: dict[str, Refined] = {}
        self.reports: list[LinearReport] = []

    def run(self, hidden: torch.Tensor) -> tuple[QuantizedLayer, torch.Tensor]:
        """The quantised layer and its output."""
        picked = hidden[spread(len(hidden), SEARCH_WINDOWS)]
        self._search(picked)
        check_folding(self.block, self.folded, picked[:2], self.name)
        out = self._round(hidden)
        vectors = {name: value for name, value in self.folded.items() if value.ndim == 1}
        order = list(self.config.architecture.linears)
        self.reports.sort(key=lambda report: order.index(report.name.split(".", 3)[3].removesuffix(".weight")))
        return QuantizedLayer(self.linears, vectors, self.reports), out

    def _stacked(self, group: ScaleGroup, tensors: Tensors) -> torch.Tensor:
        return torch.cat([tensors[f"{name}.weight"] for name in group.linears])

    def _run_of(self, group: ScaleGroup) -> Run:
        return self.block.attention if group.linears[0].startswith("self_attn.") else self.block.mlp

    def _inputs(self, group: ScaleGroup, states: torch.Tensor) -> Iterator[torch.Tensor]:
        run = self._run_of(group)
        return (self.block.input_of(group.linears[0], run, x) for x in self.block.chunks(states))

    def _search(self, picked: torch.Tensor) -> None:
        """A scale for every group, by the floating-point layer; `self.folded` becomes the folded layer."""
        middle = torch.cat([x + self.block.attention(x) for x in self.block.chunks(picked)])
        for group in self.config.architecture.scale_groups:
            states = middle if group.linears[0].startswith("mlp.") else picked
            gram, mean_abs = gram_of(self._inputs(group, states))
            heads = heads_of(group, self.config)
            choice = search_scale(self._stacked(group, self.original), gram, mean_abs, self.spec, heads)
            self.choices[group.fold_into] = self._storable(group, choice)
            self.folded |= fold(self.folded, group, self.choices[group.fold_into].scale, self.config)

    def _storable(self, group: ScaleGroup, choice: Choice) -> Choice:
        source = self.original[f"{group.fold_into}.weight"]
        return replace(choice, scale=exact_in_float16(source, choice.scale)) if source.ndim == 1 else choice

    def _round(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rounds group by group and returns the rounded layer's output."""
        qkv, out, gate_up, down = self.config.architecture.scale_groups
        self._store_vectors()
        self._round_group(qkv, gram_of(self._inputs(qkv, hidden))[0], hidden)
        middle = self._round_last(out, hidden)
        self._round_group(gate_up, gram_of(self._inputs(gate_up, middle))[0], middle)
        return self._round_last(down, middle)

    def _round_last(self, group: ScaleGroup, states: torch.Tensor) -> torch.Tensor:
        """Rounds the one linear that ends an attention block or MLP; returns `states` plus its output."""
        linear, run = self.block.linear(group.linears[0]), self._run_of(group)
        if 4 * states.shape[0] * states.shape[1] * linear.in_features <= _KEPT_BYTES:
            inputs = list(self._inputs(group, states))
            self._round_group(group, gram_of(inputs)[0], states)
            outputs = (linear(y) for y in inputs)
        else:
            self._round_group(group, gram_of(self._inputs(group, states))[0], states)
            outputs = (run(x) for x in self.block.chunks(states))
        return torch.cat([x + y for x, y in zip(self.block.chunks(states), outputs, strict=True)])

    def _store_vectors(self) -> None:
        """Biases and q/k norms are stored in float16: the block computes with the stored values from here on."""
        folds = {group.fold_into for group in self.config.architecture.scale_groups}
        for name, value in self.original.items():
            if value.ndim == 1 and name.removesuffix(".weight") not in folds:
                stored = self.folded[name]
                factor = torch.where(stored != 0, value / torch.where(stored != 0, stored, 1.0), 1.0)
                self.block.set({name: stored.half().float() * factor})

    def _round_group(self, group: ScaleGroup, gram: torch.Tensor, states: torch.Tensor) -> None:
        """Rounds a group's linears, keeps the variant with the least error, and puts it into the block."""
        original = self._stacked(group, self.original)
        variants = self._variants(group, gram, original)
        errors = self._scope_errors(group, gram, original, variants, states)
        best = min(range(len(variants)), key=lambda i: (errors[i], i))
        variant = variants[best]
        choice = self.choices[group.fold_into]
        if variant.kept == "rtn" and choice.kind != "identity":
            choice = Choice("identity", 0.0, variant.scale, choice.rtn_loss, choice.rtn_loss)
            self.choices[group.fold_into] = choice
            for name in [*group.linears, group.fold_into]:
                self.folded[f"{name}.weight"] = self._unscaled(group, name, variant.scale)
        self._commit(group, gram, variants, variant, choice)

    def _unscaled(self, group: ScaleGroup, name: str, scale: torch.Tensor) -> torch.Tensor:
        value = self.original[f"{name}.weight"]
        return value / scale if name == group.fold_into else value * scale / self._rows(name)[:, None]

    def _rows(self, name: str) -> torch.Tensor:
        """What the rows of a linear are divided by, because the scales of the linear after it fold into them."""
        n = self.original[f"{name}.weight"].shape[0]
        for group in self.config.architecture.scale_groups:
            if group.fold_into == name:
                heads, scale = heads_of(group, self.config), self.choices[name].scale
                return scale if heads is None else kv_rows(scale, heads)
        return torch.ones(n)

    def _variants(self, group: ScaleGroup, gram: torch.Tensor, original: torch.Tensor) -> list[_Variant]:
        """Roundings of the group's stacked weights, round-to-nearest first."""
        spec = self.spec
        rows = torch.cat([self._rows(name) for name in group.linears])[:, None]
        scale = self.choices[group.fold_into].scale
        foldable = self.original[f"{group.fold_into}.weight"].ndim == 1
        plain_scale = scale  # of o and down: 1/s is in rows that are rounded already
        if foldable:
            plain_scale = exact_in_float16(self.original[f"{group.fold_into}.weight"], torch.ones_like(scale))

        def variant(kept: str, s: torch.Tensor, rounded: Refined) -> _Variant:
            return _Variant(kept, s, rounded, decode(rounded.codes, rounded.grid, spec) * rows / s)

        unscaled = original * plain_scale / rows
        weight = original * scale / rows
        scaled_gram = gram / scale / scale[:, None]
        start, clipped = plain_grid(weight, spec), search_range(weight, scaled_gram, spec).grid
        grid = Grid(*(torch.where(self._clipped_rows(group), a, b) for a, b in zip(clipped, start, strict=True)))
        kept = "rtn" if foldable or self.choices[group.fold_into].kind == "identity" else "awq"
        return [
            variant(kept, plain_scale, plain(unscaled, plain_grid(unscaled, spec), spec)),
            variant("awq", scale, plain(weight, grid, spec)),
            variant("awq+refined", scale, refine(weight, grid, scaled_gram, spec)),
        ]

    def _clipped_rows(self, group: ScaleGroup) -> torch.Tensor:
        """(N, 1) mask: the query and key projections keep their whole range (AWQ, section 3.2)."""
        sizes = torch.tensor([self.original[f"{name}.weight"].shape[0] for name in group.linears])
        free = torch.tensor([not name.endswith(("q_proj", "k_proj")) for name in group.linears])
        return free.repeat_interleave(sizes)[:, None]

    def _scope_errors(
        self,
        group: ScaleGroup,
        gram: torch.Tensor,
        original: torch.Tensor,
        variants: list[_Variant],
        states: torch.Tensor,
    ) -> list[float]:
        """Squared output error of the group's scope for each variant."""
        if group.scope == group.linears[0]:
            rows = some_rows(original.shape[0], original.shape[1], CHECK_MACS)
            return [quadratic(v.effective[rows] - original[rows], gram) for v in variants]
        picked, run = states[spread(len(states), SCOPE_WINDOWS)], self._run_of(group)
        expected = torch.cat([run(x) for x in self.block.chunks(picked)])
        errors = []
        for v in variants:
            with self.block.replaced(self._split(group, v.effective)):
                found = torch.cat([run(x) for x in self.block.chunks(picked)])
            errors.append(float((found - expected).square().sum(dtype=torch.float64)))
        return errors

    def _split(self, group: ScaleGroup, stacked: torch.Tensor) -> Tensors:
        names = [f"{name}.weight" for name in group.linears]
        parts = torch.split(stacked, [self.original[name].shape[0] for name in names])
        return dict(zip(names, parts, strict=True))

    def _commit(
        self, group: ScaleGroup, gram: torch.Tensor, variants: list[_Variant], variant: _Variant, choice: Choice
    ) -> None:
        """Puts the variant's values into the block, and its codes and reports into the result."""
        self.block.set(self._split(group, variant.effective))
        codes = self._split(group, variant.rounded.codes)
        scales, zeros = self._split(group, variant.rounded.grid.scale), self._split(group, variant.rounded.grid.zero)
        scaled = self._split(group, self._stacked(group, self.folded))
        for name, effective in self._split(group, variant.effective).items():
            weight = self.original[name]
            self.linears[name] = Refined(codes[name], Grid(scales[name], zeros[name]))
            rows = some_rows(weight.shape[0], weight.shape[1], CHECK_MACS)
            some = weight[rows]
            full = quadratic(some, gram)

            def relative(value: torch.Tensor, some: torch.Tensor = some, full: float = full) -> float:
                return (quadratic(value - some, gram) / full) ** 0.5 if full > 0 else 0.0

            range_ratio = scales[name].abs() / plain_grid(scaled[name], self.spec).scale.abs()
            n, k = weight.shape
            self.reports.append(
                LinearReport(
                    f"{self.name}.{name}",
                    (n, k),
                    self.spec.name,
                    rtn_error=relative(round_to(some, plain_grid(some, self.spec), self.spec)),
                    error=relative(effective[rows]),
                    kind=choice.kind,
                    ratio=choice.ratio,
                    clipped=float((range_ratio < 0.99).float().mean()),
                    refined=variant.kept == "awq+refined",
                    kept=variant.kept,
                    note="round-to-nearest was not beaten" if variant.kept == "rtn" else "",
                )
            )


def check_folding(block: Block, folded: Tensors, x: torch.Tensor, name: str) -> None:
    """The folded floating-point layer must compute what the original does."""
    expected = block(x) - x
    with block.replaced(folded):
        found = block(x) - x
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error < FOLD_TOLERANCE:
        raise CompileError(
            f"{name}: after folding the scales the floating-point layer differs from the original by {error:.2g} "
            f"(relative to its largest update), allowed is {FOLD_TOLERANCE:g}",
            hint="a bug of awq-compile: please report it with the model's config.json; --method rtn works around it",
        )
