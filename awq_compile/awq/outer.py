"""Embedding and LM head: float16, or the linears' rounding at 8 or 4 bits.

An embedding is looked up, so its error is that of its rows: each group's range is searched by plain squared
error. An untied head is a linear: its range is searched and its codes refined with the Gram matrix of the final
norm's outputs. A tied matrix is both and is rounded once, as the embedding, before the layers run on it.
"""

from __future__ import annotations

from typing import Final

import torch

from awq_compile.awq.checkpoint import LinearReport
from awq_compile.awq.clip import search_range
from awq_compile.awq.refine import Refined, damped, inverse_cholesky, plain, refine
from awq_compile.awq.rounding import Grid, decode, plain_grid, round_to
from awq_compile.awq.search import quadratic
from awq_compile.formats import QuantSpec

_ROWS: Final = 4096  # rows rounded at once, so that memory does not grow with the vocabulary


def round_rows(weight: torch.Tensor, spec: QuantSpec, gram: torch.Tensor | None) -> Refined:
    """`weight` (V, H) by range search; with `gram` (H, H) also refined, where that lowers the output error."""
    upper = None if gram is None else inverse_cholesky(damped(gram))
    parts = []
    for rows in torch.split(weight, _ROWS):
        found = plain(rows, search_range(rows, gram, spec).grid, spec)
        if gram is not None:
            better = refine(rows, found.grid, gram, spec, upper=upper)
            errors = [quadratic(decode(r.codes, r.grid, spec) - rows, gram) for r in (found, better)]
            found = better if errors[1] < errors[0] else found
        parts.append(found)
    grid = Grid(*(torch.cat(values) for values in zip(*(part.grid for part in parts), strict=True)))
    return Refined(torch.cat([part.codes for part in parts]), grid)


def report(name: str, weight: torch.Tensor, found: Refined, spec: QuantSpec, gram: torch.Tensor | None) -> LinearReport:
    """Relative errors of plain rounding and of `found`: of the output with `gram`, else of the weights."""
    totals = [0.0, 0.0, 0.0]
    start = 0
    for rows in torch.split(weight, _ROWS):
        stop = start + len(rows)
        grid = Grid(found.grid.scale[start:stop], found.grid.zero[start:stop])
        values = (
            rows,
            round_to(rows, plain_grid(rows, spec), spec) - rows,
            decode(found.codes[start:stop], grid, spec) - rows,
        )
        for i, value in enumerate(values):
            totals[i] += float(value.square().sum(dtype=torch.float64)) if gram is None else quadratic(value, gram)
        start = stop
    full, rtn, kept = totals
    n, k = weight.shape
    return LinearReport(
        name,
        (n, k),
        spec.name,
        rtn_error=(rtn / full) ** 0.5 if full > 0 else 0.0,
        error=(kept / full) ** 0.5 if full > 0 else 0.0,
        refined=gram is not None,
        kept="range search" if gram is None else "range search+refined",
        note="error of the weights" if gram is None else "",
    )
