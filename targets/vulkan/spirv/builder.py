"""The body of the one function of a shader: blocks, and instructions numbered by value.

An instruction without side effects is emitted once per scope: the lowered IR repeats index arithmetic, and
a repeated (opcode, type, operands) within the region that a block dominates is the same id.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from awq_compile.targets.vulkan.spirv.assembler import Assembler, Words
from awq_compile.targets.vulkan.spirv.enums import BuiltIn, Decoration, Op, StorageClass
from awq_compile.targets.vulkan.spirv.types import UINT32, TypeTable

_INPUTS = {
    "blockIdx": BuiltIn.WORKGROUP_ID,
    "threadIdx": BuiltIn.LOCAL_INVOCATION_ID,
    "lane": BuiltIn.SUBGROUP_LOCAL_INVOCATION_ID,
}


class Builder:
    """Emits instructions into the current block. Between blocks (`terminated`) nothing may be emitted."""

    def __init__(self, assembler: Assembler, types: TypeTable) -> None:
        self.asm = assembler
        self.types = types
        self.code: Words = []
        self.variables: Words = []  # of the function: they stand at its beginning
        self.block = 0
        self.terminated = True
        self.inputs: dict[BuiltIn, int] = {}
        self._known: dict[tuple[int, ...], int] = {}
        self._scopes: list[list[tuple[int, ...]]] = [[]]

    # --- blocks

    def begin(self, label: int) -> None:
        """Starts a block."""
        assert self.terminated, "the block before has no end"
        self.code += (2 << 16 | Op.LABEL, label)
        self.block = label
        self.terminated = False

    def branch(self, label: int) -> None:
        """Ends the block with a jump, unless it has ended."""
        if not self.terminated:
            self.code += (2 << 16 | Op.BRANCH, label)
            self.terminated = True

    def branch_if(self, condition: int, then: int, otherwise: int) -> None:
        """Ends the block with a conditional jump."""
        self.code += (4 << 16 | Op.BRANCH_CONDITIONAL, condition, then, otherwise)
        self.terminated = True

    def merge_selection(self, merge: int) -> None:
        """The construct that the next branch opens ends at `merge`."""
        self.code += (3 << 16 | Op.SELECTION_MERGE, merge, 0)

    def merge_loop(self, merge: int, proceed: int, control: int) -> None:
        """The block is the head of a loop that ends at `merge` and repeats through `proceed`."""
        self.code += (4 << 16 | Op.LOOP_MERGE, merge, proceed, control)

    def leave(self) -> None:
        """Returns from the shader."""
        if not self.terminated:
            self.code.append(1 << 16 | Op.RETURN)
            self.terminated = True

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Values first computed inside are not reused after it."""
        self._scopes.append([])
        try:
            yield
        finally:
            for key in self._scopes.pop():
                del self._known[key]

    # --- instructions

    def pure(self, op: int, kind: int, *operands: int) -> int:
        """The id of a value that depends on its operands only."""
        key = (op, kind, *operands)
        found = self._known.get(key)
        if found is None:
            found = self.value(op, kind, *operands)
            self._known[key] = found
            self._scopes[-1].append(key)
        return found

    def value(self, op: int, kind: int, *operands: int) -> int:
        """The id of a value that is computed here, even if it was before."""
        found = self.asm.new_id()
        self.code += (len(operands) + 3 << 16 | op, kind, found, *operands)
        return found

    def effect(self, op: int, *operands: int) -> None:
        """An instruction without a result."""
        self.code += (len(operands) + 1 << 16 | op, *operands)

    def glsl(self, instruction: int, kind: int, *operands: int) -> int:
        """A function of GLSL.std.450."""
        return self.pure(Op.EXT_INST, kind, self.asm.glsl(), instruction, *operands)

    def phi(self, kind: int, *sources: tuple[int, int]) -> int:
        """The value that (value, block) says for the block we come from."""
        return self.value(Op.PHI, kind, *[word for source in sources for word in source])

    def reserve_phi(self, kind: int) -> tuple[int, int]:
        """A phi with two sources of which the second follows; (id, position for `complete_phi`)."""
        found = self.value(Op.PHI, kind, 0, 0, 0, 0)
        return found, len(self.code) - 4

    def complete_phi(self, position: int, *sources: tuple[int, int]) -> None:
        """Fills in what `reserve_phi` left open."""
        self.code[position : position + 4] = [word for source in sources for word in source]

    def local(self, target: int) -> int:
        """A new variable of the function."""
        pointer, found = self.types.pointer(StorageClass.FUNCTION, target), self.asm.new_id()
        self.variables += (4 << 16 | Op.VARIABLE, pointer, found, StorageClass.FUNCTION)
        return found

    def component(self, name: str, axis: int | None) -> int:
        """A uint32 input: `blockIdx` or `threadIdx` along an axis, or `lane`."""
        built_in = _INPUTS[name]
        scalar = self.types.vector(UINT32, 1)
        kind = scalar if axis is None else self.types.vector(UINT32, 3)
        if built_in not in self.inputs:
            self.inputs[built_in] = self.types.global_variable(StorageClass.INPUT, kind)
            self.asm.decorate(self.inputs[built_in], Decoration.BUILTIN, built_in)
        loaded = self.pure(Op.LOAD, kind, self.inputs[built_in])  # an input does not change
        return loaded if axis is None else self.pure(Op.COMPOSITE_EXTRACT, scalar, loaded, axis)
