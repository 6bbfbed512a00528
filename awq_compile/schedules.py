"""Schedules: frozen data that a kernel template takes, and their legality.

A schedule belongs to a template, never to a device; which schedule a device gets is the tuning database's
or the target's rule to say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from awq_compile.errors import CompileError
from awq_compile.formats import QuantSpec
from awq_compile.problem import ROW_BUCKETS, MatmulProblem

LANES: Final = (1, 2, 4, 8, 16)
UNITS: Final = (8, 16, 32)


@dataclass(frozen=True)
class GemvSchedule:
    """For `kernels.simd_gemv`: few rows of x against a weight that is read once.

    `lanes`: 32-bit elements of a vector; `rows`: rows of W per thread and step (they share the loads of
    x); `batch`: rows of x computed together (they share the decoding of W); `prefetch`: how many blocks of
    `rows` ahead the weights are fetched into the cache, 0 to leave that to the hardware.
    """

    lanes: int
    rows: int
    batch: int = 1
    prefetch: int = 0

    def __post_init__(self) -> None:
        if self.lanes not in LANES or self.rows < 2 or self.rows % 2 or self.batch < 1:
            raise CompileError(f"illegal {self}: lanes {LANES}, an even number of rows, batch of at least 1")


@dataclass(frozen=True)
class GemmSchedule:
    """For `kernels.simd_gemm`: many rows of x against a panel of W that is decoded into the cache.

    A register tile is `m_tile` rows by `n_vectors * lanes` columns; a decoded panel is `k_block` deep; the
    sums of `m_block` rows stay in the cache while the panels along K pass.
    """

    lanes: int
    m_tile: int
    n_vectors: int
    k_block: int
    m_block: int

    def __post_init__(self) -> None:
        if self.lanes not in LANES or self.n_vectors < 1 or self.m_tile < 1:
            raise CompileError(f"illegal {self}: lanes {LANES}, at least one vector and one row")
        if self.m_block % self.m_tile or self.k_block % 128:
            raise CompileError(f"illegal {self}: m_block a multiple of m_tile, k_block of 128")

    def fit(self, n: int, *, pairs: bool) -> GemmSchedule:
        """This schedule with fewer vectors, then lanes, until a block has at most `n` columns.

        With `pairs` half of the vectors are gates, so there are at least two.
        """
        least = 2 if pairs else 1
        vectors = max(self.n_vectors // least * least, least)
        while vectors > least and vectors // least * self.lanes > n:
            vectors -= least
        lanes = self.lanes
        while lanes > 1 and vectors // least * lanes > n:
            lanes //= 2
        return replace(self, n_vectors=vectors, lanes=lanes)


@dataclass(frozen=True)
class SimtGemvSchedule:
    """For `kernels.simt_gemv`: a block of (k_threads, row_groups) threads, powers of two.

    `rows`: rows of W per thread (even: `silu_mul` pairs them); `unit`: weights of a row that a thread
    decodes at a time; `batch`: rows of x computed together; `subgroup`: threads that can shuffle, 0 to
    reduce through shared memory; `magic`: integers become floats by bits instead of a conversion.
    """

    k_threads: int
    row_groups: int
    rows: int
    unit: int
    batch: int = 1
    subgroup: int = 0
    magic: bool = False

    def __post_init__(self) -> None:
        if self.k_threads & (self.k_threads - 1) or self.rows % 2 or self.unit not in UNITS or self.batch < 1:
            raise CompileError(f"illegal {self}: k_threads a power of two, even rows, unit one of {UNITS}")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.k_threads * self.row_groups

    @property
    def in_place(self) -> bool:
        """Whether x is shifted, exactly, and not each code: x is shared by `rows`, a code by `batch`."""
        return self.rows > self.batch and not self.magic

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the reduction."""
        by_shuffles = self.k_threads == 1 or (self.subgroup and self.subgroup % self.k_threads == 0)
        return 0 if by_shuffles else self.threads * self.rows * self.batch * 4


@dataclass(frozen=True)
class MatrixGemvSchedule:
    """For `kernels.mma_gemv`, any number of rows: a block takes `tiles` times 16 rows of W, `columns` times 8 of x.

    Its `warps` share the groups along K. `stages`: 1, where a group's words are read into registers while the one
    before is multiplied; else so many groups have a place in shared memory, all but one of them on their way.
    `resident`: blocks that a multiprocessor shall hold at once, which limits registers; 0 leaves that to the compiler.
    """

    warps: int
    tiles: int = 1
    columns: int = 1
    stages: int = 1
    resident: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.warps <= 32 or self.tiles not in (1, 2, 4) or self.columns not in (1, 2, 4, 8):
            raise CompileError(f"illegal {self}: 1 to 32 warps, tiles one of (1, 2, 4), columns of (1, 2, 4, 8)")
        if self.stages not in (1, 2, 3, 4):
            raise CompileError(f"illegal {self}: 1 to 4 stages")
        if self.resident < 0 or self.resident * self.threads > 2048:
            raise CompileError(f"illegal {self}: at most 2048 resident threads")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the warps' sums, and of words on their way."""
        words = 0 if self.stages == 1 else self.stages * self.tiles * 32
        return self.threads * (self.tiles * self.columns * 16 + words)

    @staticmethod
    def groups(problem: MatmulProblem) -> int:
        """Groups along K that warps share; 0 where the template does not take the weights.

        It takes 4 bits in groups of 128 whose rows of W lie together, and float16, of which 64 make a group.
        """
        spec = problem.spec
        if isinstance(spec, QuantSpec):
            return problem.k // 128 if (spec.bits, spec.group, spec.order) == (4, 128, "NK") else 0
        return 0 if problem.k % 64 else problem.k // 64


@dataclass(frozen=True)
class StagedMatrixSchedule:
    """For `kernels.mma_staged`, many rows: each of `warps` takes `tiles` times 16 rows of W.

    All of them take `columns` times 8 rows of x. `stages`: pieces of x, 64 along K, that shared memory holds: one is
    used, the others are on their way.
    """

    warps: int
    tiles: int
    columns: int
    stages: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.warps <= 16 or self.tiles not in (1, 2, 4) or self.columns not in (4, 8, 16):
            raise CompileError(f"illegal {self}: 1 to 16 warps, tiles one of (1, 2, 4), columns of (4, 8, 16)")
        if self.stages not in (2, 3, 4) or self.columns * 64 % self.threads:
            raise CompileError(f"illegal {self}: 2 to 4 stages, and whole pieces of x for every thread")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the stages."""
        return self.stages * self.columns * 8 * 128


WGMMA_COLUMNS: Final = (2, 4, 8, 16, 32)
ARRANGED_BEHIND: Final = 8 * max(WGMMA_COLUMNS) - 1  # rows behind those of x, so that every block of them is whole


@dataclass(frozen=True)
class WarpgroupSchedule:
    """For `kernels.wgmma_gemm`, many rows, on sm_90: each of `warpgroups` takes `tiles` times 64 rows of W.

    All of them take `columns` times 8 rows of x. `slices`: as many such sets of warpgroups share the groups along K.
    `stages`: pieces of x, 64 along K, that shared memory holds of each slice. `ahead`: groups whose words wait in
    registers.
    """

    warpgroups: int
    tiles: int
    columns: int
    slices: int = 1
    stages: int = 4
    ahead: int = 1

    def __post_init__(self) -> None:
        if self.warpgroups not in (1, 2, 4) or self.tiles not in (1, 2) or self.columns not in WGMMA_COLUMNS:
            raise CompileError(f"illegal {self}: warpgroups one of (1, 2, 4), tiles of (1, 2), columns {WGMMA_COLUMNS}")
        if self.slices not in (1, 2, 4, 8) or self.threads > 1024:
            raise CompileError(f"illegal {self}: slices one of (1, 2, 4, 8), and at most 1024 threads")
        if not 2 <= self.stages <= 8:
            raise CompileError(f"illegal {self}: 2 to 8 stages")
        if self.ahead not in (1, 2, 4):
            raise CompileError(f"illegal {self}: ahead one of (1, 2, 4)")
        if (self.slices - 1) * self.of_sums > self.slices * self.stages * self.of_stage:
            raise CompileError(f"illegal {self}: the sums of all slices but one must fit into the stages")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.warpgroups * self.slices

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the stages and of their barriers. The slices' sums lie there in the end."""
        return self.slices * self.stages * (self.of_stage + 8)

    @property
    def of_stage(self) -> int:
        """Bytes of a stage."""
        return self.columns * 8 * 128

    @property
    def of_sums(self) -> int:
        """Bytes of a slice's sums."""
        return self.threads // self.slices * self.tiles * self.columns * 16

    def divides(self, k: int) -> bool:
        """Whether all slices have as many groups."""
        return k // 128 % self.slices == 0


@dataclass(frozen=True)
class ColumnGemvSchedule:
    """For `kernels.column_gemv`, weights in KN: a block of (n_threads, k_threads) threads.

    `columns`: neighbouring outputs per thread, read by one vector load; `unit`: weights of an output that a
    thread decodes at a time; `batch`: rows of x computed together; `magic` as for `SimtGemvSchedule`.
    """

    n_threads: int
    k_threads: int
    columns: int
    unit: int
    batch: int = 1
    magic: bool = False

    def __post_init__(self) -> None:
        if self.n_threads < 1 or self.k_threads < 1 or self.batch < 1:
            raise CompileError(f"illegal {self}: threads and batch of at least 1")
        if self.columns not in (1, 2, 4) or self.unit not in UNITS:
            raise CompileError(f"illegal {self}: columns one of (1, 2, 4), unit one of {UNITS}")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.n_threads * self.k_threads

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the sums, for gates and ups."""
        return 0 if self.k_threads == 1 else self.threads * 2 * self.columns * self.batch * 4

    def fit(self, n: int) -> ColumnGemvSchedule:
        """This schedule with as many columns as keep vector loads of an (…, n) array aligned."""
        columns = self.columns
        while n % columns:
            columns //= 2
        return replace(self, columns=columns)


@dataclass(frozen=True)
class SimtGemmSchedule:
    """For `kernels.simt_gemm`: block and thread tiles; `shared` is the type of the tiles in shared memory."""

    block_m: int
    block_n: int
    block_k: int
    thread_m: int
    thread_n: int
    unit: int
    shared: str = "float16"
    magic: bool = False

    def __post_init__(self) -> None:
        whole = (
            self.block_m % self.thread_m == 0 and self.block_n % self.thread_n == 0 and self.block_k % self.unit == 0
        )
        if not whole or self.thread_n % 2 or self.unit not in UNITS or self.block_k % 4:
            raise CompileError(f"illegal {self}: whole tiles, an even thread_n, unit one of {UNITS}")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.block_m // self.thread_m * (self.block_n // self.thread_n)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of both tiles."""
        return self.block_k * (self.block_m + self.block_n) * (2 if self.shared == "float16" else 4)


MATRIX_INSTRUCTIONS: Final = {"m16n8k16": (16, 8, 16), "m16n8k8": (16, 8, 8), "simdgroup8x8": (8, 8, 8)}


@dataclass(frozen=True)
class MatrixGemmSchedule:
    """For `kernels.mma_gemm` and `kernels.simdgroup_gemm`: warps_m x warps_n warps share a block tile.

    `instruction`: `m16n8k16` (tensor cores from sm_80 on), `m16n8k8` (sm_75) or Metal's `simdgroup8x8`.
    """

    block_m: int
    block_n: int
    block_k: int
    warps_m: int
    warps_n: int
    unit: int
    instruction: str
    magic: bool = False

    def __post_init__(self) -> None:
        if self.instruction not in MATRIX_INSTRUCTIONS or self.unit not in UNITS or self.block_k % 32:
            raise CompileError(f"illegal {self}: instruction, unit {UNITS}, block_k a multiple of 32")
        m, n, _ = self.shape
        whole = self.block_m % (m * self.warps_m) == 0 and self.block_n % (2 * n * self.warps_n) == 0
        staged = self.block_m * self.block_k % (8 * self.threads) == 0
        if not whole or not staged or self.block_n * self.block_k % (self.unit * self.threads):
            raise CompileError(f"illegal {self}: whole tiles for every warp, and whole pieces for every thread")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, n, k) of one instruction."""
        return MATRIX_INSTRUCTIONS[self.instruction]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def row(self) -> int:
        """Elements from one row of a tile to the next: 16 bytes of padding keep rows out of each other's banks."""
        return self.block_k + 8

    @property
    def shared_bytes(self) -> int:
        """Shared memory: both tiles, and the sums on their way to the epilogue where they must pass through it."""
        sums = 4 * self.block_m * self.block_n if self.instruction == "simdgroup8x8" else 0
        return 2 * (self.block_m + self.block_n) * self.row + sums


FewRows = GemvSchedule | SimtGemvSchedule | MatrixGemvSchedule | ColumnGemvSchedule
ManyRows = (
    GemmSchedule | SimtGemmSchedule | MatrixGemmSchedule | MatrixGemvSchedule | StagedMatrixSchedule | WarpgroupSchedule
)


@dataclass(frozen=True)
class LinearSchedule:
    """One schedule for each bucket of rows, `problem.ROW_BUCKETS`. Where there is none, the next takes its rows too."""

    gemv: FewRows
    small: FewRows
    gemm: ManyRows
    pair: FewRows | None = None
    quad: FewRows | None = None
    medium: ManyRows | None = None
    broad: ManyRows | None = None
    large: ManyRows | None = None
    wide: ManyRows | None = None

    @property
    def by_bucket(self) -> dict[str, FewRows | ManyRows]:
        """The schedules that there are, few rows first."""
        found = {bucket: getattr(self, bucket) for bucket in ROW_BUCKETS}
        return {bucket: schedule for bucket, schedule in found.items() if schedule is not None}

    @property
    def arranges(self) -> bool:
        """Whether a kernel has x arranged ahead."""
        return any(isinstance(s, WarpgroupSchedule) for s in self.by_bucket.values())

    def of(self, bucket: str) -> FewRows | ManyRows:
        """The schedule of a bucket. Raises `CompileError` where it has none of its own."""
        if (found := self.by_bucket.get(bucket)) is None:
            raise CompileError(
                f"the bucket {bucket} has no kernel of its own", hint=f"known: {', '.join(self.by_bucket)}"
            )
        return found


@dataclass(frozen=True)
class DecodeAttentionSchedule:
    """For `kernels.gpu_attention`: a sequence is cut into chunks, and a block takes one chunk of one key/value head.

    `threads` of a block, of which `key_threads` at most share a key; a thread reads `keys` keys and `values` vectors
    of values ahead, by loads of `vector_bytes`. Chunks have at most `positions`, or a page, and are shorter where
    there would be fewer than `blocks`. At most `group` query heads of a key/value head share a block, and the sums of
    at most `sums` of them meet in shared memory at a time; fewer where all would take more than `shared_bytes`.
    `subgroup` threads may shuffle, 0 for none.
    """

    threads: int
    key_threads: int
    keys: int
    values: int
    vector_bytes: int
    positions: int
    blocks: int
    subgroup: int
    shared_bytes: int
    sums: int = 8
    group: int = 8

    def __post_init__(self) -> None:
        if self.threads & (self.threads - 1) or self.key_threads & (self.key_threads - 1):
            raise CompileError(f"illegal {self}: threads are powers of two")
        if min(self.keys, self.values, self.positions, self.blocks, self.sums, self.group) < 1:
            raise CompileError(f"illegal {self}: at least one key, value, position, block and head")
