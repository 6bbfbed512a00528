"""What somebody would write in Triton for INT4 weights and float16 activations: a kernel to compare ours with.

W lies as ours does: (N, K/8) words of eight codes along K, a float16 scale for each group of 128, w = (q - 7) s. Words
are loaded once, coalesced, and become float16 by bits. For a few rows K is split among blocks that add up in y, as in
Hoque et al., "Accelerating a Triton Fused Kernel for W4A16 Quantized Inference with SplitK Work Decomposition" (2024);
for one row there is a GEMV without `tl.dot` as well. N is a multiple of 256 and K of 1024.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

GROUP = 128


@triton.jit
def _spread(word, R: tl.constexpr, C: tl.constexpr):
    """(R, C) words → (R, 8 C), each code in the low bits; a thread keeps those of a word, in order."""
    word = tl.reshape(tl.join(word, word >> 16), (R, 2 * C))
    word = tl.reshape(tl.join(word, word >> 8), (R, 4 * C))
    return tl.reshape(tl.join(word, word >> 4), (R, 8 * C))


@triton.jit
def _gemv(x, words, scales, y, n, k, row_words, row_groups, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.arange(0, BK // 8)
    total = tl.zeros((BN, BK // 8), tl.float32)
    for step in range(k // BK):
        word = tl.load(words + rows[:, None] * row_words + (step * (BK // 8) + columns)[None, :])
        scale = tl.load(scales + rows[:, None] * row_groups + ((step * BK + 8 * columns) // 128)[None, :])
        value = tl.load(x + step * BK + tl.arange(0, BK)).to(tl.float32)
        bits = (_spread(word, BN, BK // 8) & 15) | 0x4B000000  # 2^23 + q
        product = (bits.to(tl.float32, bitcast=True) - 8388615.0) * value[None, :]
        total += tl.sum(tl.reshape(product, (BN, BK // 8, 8)), 2) * scale.to(tl.float32)
    tl.store(y + rows, tl.sum(total, 1).to(tl.float16))


@triton.jit(do_not_specialize=["m"])
def _gemm(
    x, words, scales, y, m, n, k, row_words, row_groups,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(m, BM), n // BN
    # Blocks that run together share rows of x and of W in the L2.
    first = block // (TOGETHER * tiles_n) * TOGETHER
    height = min(tiles_m - first, TOGETHER)
    at_m = first + block % (TOGETHER * tiles_n) % height
    at_n = block % (TOGETHER * tiles_n) // height
    rows, columns = at_m * BM + tl.arange(0, BM), at_n * BN + tl.arange(0, BN)
    inner, packed = part * BK + tl.arange(0, BK), part * (BK // 8) + tl.arange(0, BK // 8)
    of_x = x + (rows % m)[:, None] * k + inner[None, :]  # rows beyond m are read again, and not stored
    of_w = words + columns[:, None] * row_words + packed[None, :]
    of_scales = scales + columns * row_groups
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(part, k // BK, SPLIT):
        a, word = tl.load(of_x), tl.load(of_w)
        scale = tl.load(of_scales + step * BK // 128)
        bits = (_spread(word, BN, BK // 8) & 15) | 0x6400  # 1024 + q
        w = (bits.to(tl.int16).to(tl.float16, bitcast=True) - 1031.0) * scale[:, None]
        total = tl.dot(a, tl.trans(w), total)
        of_x += SPLIT * BK
        of_w += SPLIT * (BK // 8)
    of_y, inside = y + rows[:, None] * n + columns[None, :], (rows < m)[:, None]
    if SPLIT == 1:
        tl.store(of_y, total.to(tl.float16), mask=inside)
    else:
        tl.atomic_add(of_y, total.to(tl.float16), mask=inside, sem="relaxed")


@triton.jit
def _dequantise(words, scales, w, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = (_spread(tl.load(words + i)[None, :], 1, BLOCK) & 15) | 0x6400
    k = 8 * tl.program_id(0) * BLOCK + tl.arange(0, 8 * BLOCK)
    scale = tl.load(scales + k // 128)
    code = bits.to(tl.int16).to(tl.float16, bitcast=True) - 1031.0
    tl.store(w + k[None, :], code * scale[None, :])


@dataclass(frozen=True)
class Config:
    """Tile of a block, of `_gemv` where `bm` is 0; K is split among `split` blocks."""

    bm: int
    bn: int
    bk: int
    split: int = 1
    warps: int = 4
    stages: int = 3


ONE_ROW = (Config(0, 4, 1024), Config(0, 8, 512), Config(0, 16, 512))
FEW_ROWS = (
    Config(16, 32, 128, 4, 4, 4),
    Config(16, 64, 128, 2, 4, 4),
    Config(16, 64, 128, 4, 4, 4),
    Config(16, 64, 128, 8, 4, 4),
    Config(16, 128, 128, 8, 4, 3),
)
SOME_ROWS = (
    Config(32, 64, 128, 2, 4, 4),
    Config(32, 64, 128, 4, 4, 4),
    Config(64, 64, 128, 4, 4, 3),
    Config(64, 128, 64, 2, 4, 4),
    Config(64, 128, 64, 1, 4, 4),
)
MANY_ROWS = (
    Config(64, 128, 64, 1, 4, 4),
    Config(128, 128, 64, 1, 4, 3),
    Config(128, 128, 64, 1, 8, 3),
    Config(128, 256, 64, 1, 8, 3),
    Config(256, 128, 64, 1, 8, 3),
)


def configs(m: int) -> tuple[Config, ...]:
    """Those to try for `m` rows."""
    if m == 1:
        return ONE_ROW + FEW_ROWS
    return FEW_ROWS if m <= 16 else SOME_ROWS if m <= 64 else MANY_ROWS


def linear(config: Config, x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, y: torch.Tensor) -> None:
    """y (M, N) = x (M, K) Wᵀ."""
    (m, k), n = x.shape, y.shape[1]
    sizes = n, k, words.shape[1], scales.shape[1]
    how = {"num_warps": config.warps, "num_stages": config.stages}
    if config.bm == 0:
        _gemv[n // config.bn,](x, words, scales, y, *sizes, config.bn, config.bk, **how)
        return
    if config.split > 1:
        y.zero_()
    grid = triton.cdiv(m, config.bm) * (n // config.bn), config.split
    _gemm[grid](x, words, scales, y, m, *sizes, config.bm, config.bn, config.bk, config.split, 8, **how)


def dequantise(words: torch.Tensor, scales: torch.Tensor, w: torch.Tensor) -> None:
    """w (N, K) float16."""
    _dequantise[words.numel() // 256,](words, scales, w, 256)


def compile_all() -> None:
    """Compiles every configuration at once, on as many cores as there are."""

    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for config in dict.fromkeys(ONE_ROW + FEW_ROWS + SOME_ROWS + MANY_ROWS):
            x, words, sizes = torch.float16, torch.int32, (4096, 4096, 512, 32)
            how = {"grid": (1, 1), "num_warps": config.warps, "num_stages": config.stages}
            if config.bm == 0:
                _gemv.warmup(x, words, x, x, *sizes, config.bn, config.bk, **how)
            else:
                tiles = config.bm, config.bn, config.bk, config.split, 8
                _gemm.warmup(x, words, x, x, 64, *sizes, *tiles, **how)
