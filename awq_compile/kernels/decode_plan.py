"""How decode attention is cut into chunks, blocks and threads, and the memory that takes. See `gpu_attention`.

A chunk is of one sequence, and of whole pages. Its results stand in a slot of the workspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx

from awq_compile.errors import CompileError
from awq_compile.kernels.attention import AttentionShape
from awq_compile.kernels.merge_chunks import Partial
from awq_compile.schedules import DecodeAttentionSchedule

Expr = Any

_SLOTS: Final = 64  # the workspace grows by so many, for TVM's runtime waits for the device when it does


@dataclass(frozen=True)
class DecodePlan:
    """How a schedule fits a shape: `lanes` elements of a load, `columns` loads of a row of D elements.

    `key_threads` share a key, and `group` query heads a block.
    """

    shape: AttentionShape
    schedule: DecodeAttentionSchedule
    lanes: int
    columns: int
    key_threads: int
    group: int

    @staticmethod
    def of(shape: AttentionShape, schedule: DecodeAttentionSchedule) -> DecodePlan:
        """Raises `CompileError` where a block has too few threads or too little memory."""
        lanes = math.gcd(shape.head_dim, schedule.vector_bytes // (2 if shape.dtype == "float16" else 4))
        columns = shape.head_dim // lanes
        if columns > schedule.threads:
            raise CompileError(
                f"head_dim {shape.head_dim} has {columns} vectors, more than a block's {schedule.threads} threads"
            )
        groups = [n for n in range(schedule.group, 0, -1) if shape.group % n == 0]
        plans = [
            DecodePlan(shape, schedule, lanes, columns, math.gcd(columns, schedule.key_threads), n) for n in groups
        ]
        for plan in plans:
            if plan.shared_bytes(1) <= schedule.shared_bytes:
                return plan
        raise CompileError(
            f"attention with head_dim {shape.head_dim} and pages of {shape.page} takes {plans[-1].shared_bytes(1)} "
            f"bytes of shared memory, and there are {schedule.shared_bytes}"
        )

    @property
    def key_rows(self) -> int:
        """Keys that the block reads side by side."""
        return self.schedule.threads // self.key_threads

    @property
    def key_vectors(self) -> int:
        """Loads of a thread for a key."""
        return self.columns // self.key_threads

    @property
    def value_rows(self) -> int:
        """Values that the block reads side by side; threads beyond them do the last row's work again."""
        return self.schedule.threads // self.columns

    @property
    def parts(self) -> int:
        """Blocks that share a key/value head's query heads."""
        return self.shape.group // self.group

    @property
    def blocks_of_chunk(self) -> int:
        """For all heads."""
        return self.shape.kv_heads * self.parts

    @property
    def most_pages(self) -> int:
        """Of a chunk."""
        return max(1, self.schedule.positions // self.shape.page)

    @property
    def scores(self) -> int:
        """Rows of scores: those of a chunk, in whole steps of `value_rows`."""
        return -(-self.most_pages * self.shape.page // self.value_rows) * self.value_rows

    def shared_bytes(self, together: int) -> int:
        """Of a block, where the sums of so many query heads meet at a time."""
        dim, rows = self.shape.head_dim, self.value_rows
        exchange = 0 if self.shuffles else self.schedule.threads
        of_head = dim + 2 * self.scores + self.key_rows + rows + 1 + exchange
        return 4 * (self.group * of_head + together * rows * dim)

    @property
    def together(self) -> int:
        """Query heads whose sums meet in shared memory at a time."""
        most = min(self.schedule.sums, self.group)
        return next(n for n in range(most, 0, -1) if self.shared_bytes(n) <= self.schedule.shared_bytes)

    @property
    def shuffles(self) -> bool:
        """Whether the threads of a key can."""
        return self.key_threads == 1 or bool(self.schedule.subgroup and self.schedule.subgroup % self.key_threads == 0)

    def pages_of_chunk(self, used: Expr) -> Expr:
        """Whole pages, by which sequences of `used` pages in all make about `blocks`."""
        wanted = tirx.floordiv(used * self.blocks_of_chunk + (self.schedule.blocks - 1), self.schedule.blocks)
        return tirx.max(tirx.min(wanted, self.most_pages), 1)

    def workspace_floats(self, slots: Expr) -> Expr:
        """Floats for so many slots, a number or an expression."""
        return (slots + (_SLOTS - 1)) // _SLOTS * _SLOTS * Partial.floats(self.shape)

    def workspace_bytes(self, sequences: int, pages: int) -> int:
        """The most for so many sequences of so many pages in all.

        P pages make P // most_pages slots, those of shorter chunks at most P and blocks // blocks_of_chunk; and one
        more a sequence.
        """
        shorter = min(pages, self.schedule.blocks // self.blocks_of_chunk)
        return int(4 * self.workspace_floats(max(pages // self.most_pages, shorter) + sequences))
