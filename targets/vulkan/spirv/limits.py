"""What a target says that its devices can do, and the check of a finished shader against it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from awq_compile.errors import CompileError
from awq_compile.targets.vulkan.spirv.enums import Capability

_ATTRIBUTES: Final = {
    Capability.INT8: "supports_int8",
    Capability.INT16: "supports_int16",
    Capability.INT64: "supports_int64",
    Capability.FLOAT16: "supports_float16",
    Capability.FLOAT64: "supports_float64",
    Capability.STORAGE_BUFFER_8BIT_ACCESS: "supports_8bit_buffer",
    Capability.STORAGE_BUFFER_16BIT_ACCESS: "supports_16bit_buffer",
}
# Bits of VkSubgroupFeatureFlags, which TVM keeps in `supported_subgroup_operations`.
_SUBGROUP_BITS: Final = {Capability.GROUP_NON_UNIFORM: 0x1, Capability.GROUP_NON_UNIFORM_SHUFFLE: 0x10}


@dataclass(frozen=True)
class Limits:
    """A number is None where the target does not say."""

    capabilities: frozenset[Capability]
    threads: int | None
    block: tuple[int | None, int | None, int | None]
    shared_bytes: int | None
    push_constant_bytes: int
    buffers: int | None

    @staticmethod
    def of(target: Any) -> Limits:
        """From the attributes of a `vulkan` target of TVM."""
        attrs = target.attrs

        def number(name: str) -> int | None:
            value = attrs.get(name)
            return None if value is None else int(value)

        subgroups = number("supported_subgroup_operations") or 0
        granted = {c for c, name in _ATTRIBUTES.items() if attrs.get(name)}
        granted |= {c for c, bit in _SUBGROUP_BITS.items() if subgroups & bit}
        return Limits(
            capabilities=frozenset({Capability.SHADER, *granted}),
            threads=number("max_threads_per_block") or number("max_num_threads"),
            block=(number("max_block_size_x"), number("max_block_size_y"), number("max_block_size_z")),
            shared_bytes=number("max_shared_memory_per_block"),
            # TVM's runtime decides by 128, whatever the device offers (kMaxPushConstantsBytes).
            push_constant_bytes=128,
            buffers=number("max_per_stage_descriptor_storage_buffer"),
        )

    def check(
        self, name: str, capabilities: Iterable[Capability], local_size: list[int], shared_bytes: int, buffers: int
    ) -> None:
        """Raises `CompileError` with the limit that a shader exceeds."""
        for capability in sorted(set(capabilities) - self.capabilities):
            attribute = _ATTRIBUTES.get(capability, "supported_subgroup_operations")
            raise CompileError(
                f"{name} needs the SPIR-V capability {capability.name}, which the target does not grant",
                hint=f"if the devices have it, set {attribute} in the target",
            )
        pairs = (
            ("threads in a block", prod(local_size), self.threads, "max_threads_per_block"),
            ("bytes of shared memory", shared_bytes, self.shared_bytes, "max_shared_memory_per_block"),
            ("storage buffers", buffers, self.buffers, "max_per_stage_descriptor_storage_buffer"),
            *(
                (f"threads along {axis}", n, m, f"max_block_size_{axis}")
                for axis, n, m in zip("xyz", local_size, self.block, strict=True)
            ),
        )
        for what, used, limit, attribute in pairs:
            if limit is not None and used > limit:
                raise CompileError(
                    f"{name} uses {used} {what}, the target has {limit}",
                    hint=f"choose a smaller schedule; if the devices have more, set {attribute} in the target",
                )
