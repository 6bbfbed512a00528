"""Makes TVM build for `vulkan` where the wheel brings no code generator for it.

    with vulkan_codegen() as session:
        executable = relax.build(module, target)      # device functions → session.shaders
        executable.export_library(path)               # within the block too: here the shaders are packed

TVM asks the global function `target.build.vulkan` for a runtime module. No Vulkan module can be made in
the wheel, so it gets a placeholder: an OpenCL module of the same functions without bodies, which carries
their table (names, arguments, launch tags), and one function more whose name is the shaders' digest. At
export `codegen.codegen_blob` receives all modules as bytes: there a module with such a digest becomes a
Vulkan module. Both registrations end with the block, and modules of other targets pass through unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import tvm
import tvm_ffi
from tvm import tirx

from awq_compile.errors import CompileError
from awq_compile.targets.vulkan.blob import (
    Blob,
    BlobModule,
    parse_blob,
    parse_opencl_payload,
    write_blob,
    write_vulkan_payload,
)
from awq_compile.targets.vulkan.spirv.assembler import to_bytes
from awq_compile.targets.vulkan.spirv.limits import Limits
from awq_compile.targets.vulkan.spirv.shader import Shader, build_shader

BUILD: Final = "target.build.vulkan"
PACK: Final = "codegen.codegen_blob"
_MARK: Final = "awq_compile_spirv_"
# Called in every body of the placeholder: OpenCL code that gets out by mistake does not compile.
_NOT_OPENCL: Final = "vulkan_library_was_exported_outside_of_vulkan_codegen"


@dataclass
class VulkanSession:
    """What was built within a `vulkan_codegen` block."""

    uses_own_generator: bool
    modules: dict[str, dict[str, Shader]] = field(default_factory=dict)  # digest → name → shader
    error: CompileError | None = None  # TVM's call interface makes a RuntimeError of it

    @property
    def shaders(self) -> dict[str, Shader]:
        """All shaders, by name; of the last build where several have one name."""
        return {name: shader for module in self.modules.values() for name, shader in module.items()}


_session: VulkanSession | None = None


@contextmanager
def vulkan_codegen(*, replace: bool = False) -> Iterator[VulkanSession]:
    """Provides `target.build.vulkan` within the block. A generator that TVM brings is kept unless `replace`.

    A block within a block shares the outer one's session. Not for use by several threads at a time: TVM's
    registry is the process's.
    """
    global _session
    if _session is not None:
        yield _session
        return
    brought = tvm_ffi.get_global_func(BUILD, allow_missing=True)
    if brought is not None and not replace:
        yield VulkanSession(uses_own_generator=False)
        return
    pack = tvm_ffi.get_global_func(PACK)
    session = _session = VulkanSession(uses_own_generator=True)
    try:
        tvm_ffi.register_global_func(BUILD, _builder(session), override=True)
        tvm_ffi.register_global_func(PACK, _packer(session, pack), override=True)
        yield session
    except RuntimeError:
        if session.error is not None:
            raise session.error from None
        raise
    finally:
        _session = None
        tvm_ffi.register_global_func(PACK, pack, override=True)
        if brought is None:
            tvm_ffi.remove_global_func(BUILD)
        else:
            tvm_ffi.register_global_func(BUILD, brought, override=True)


def build_shaders(module: Any, target: Any) -> dict[str, Shader]:
    """Shaders of the lowered device functions of a module, sorted by name."""
    limits = Limits.of(target)
    functions = {str(f.attrs["global_symbol"]): f for f in module.functions.values()}
    return {name: build_shader(functions[name], limits) for name in sorted(functions)}


def _builder(session: VulkanSession) -> Callable[[Any, Any], Any]:
    def build(module: Any, target: Any) -> Any:
        try:
            shaders = build_shaders(module, target)
        except CompileError as error:
            session.error = error
            raise
        digest = _digest(shaders)
        session.modules.pop(digest, None)  # the last build is the last entry
        session.modules[digest] = shaders
        return _placeholder(module, _MARK + digest)

    return build


def _digest(shaders: dict[str, Shader]) -> str:
    total = hashlib.sha256()
    for name, shader in shaders.items():
        total.update(f"{name} {shader.arguments} {shader.flag} {len(shader.words)}\n".encode())
        total.update(to_bytes(shader.words))
    return total.hexdigest()


def _placeholder(module: Any, mark: str) -> Any:
    """An OpenCL module with the functions' signatures, and one named `mark`."""
    opencl = tvm.target.Target("opencl")
    body = tirx.Evaluate(tirx.call_extern("int32", _NOT_OPENCL))
    functions, some = {}, None
    for var, function in module.functions.items():
        some = tirx.PrimFunc(function.params, body, attrs=function.attrs).with_attr("target", opencl)
        functions[var] = some
    if some is None:
        raise CompileError("Vulkan: there are no device functions to build")
    marker = tirx.PrimFunc([], body, attrs=some.attrs).with_attr("global_symbol", mark)
    functions[tvm.ir.GlobalVar(mark)] = marker.with_attr("tirx.kernel_launch_params", [])
    return tvm_ffi.get_global_func("target.build.opencl")(tvm.IRModule(functions), opencl)


def _packer(session: VulkanSession, original: Callable[..., Any]) -> Callable[..., Any]:
    def pack(data: bytes, *rest: Any) -> Any:
        return original(replace_placeholders(data, session.modules), *rest)

    return pack


def replace_placeholders(data: bytes, modules: dict[str, dict[str, Shader]]) -> bytes:
    """The blob with each placeholder replaced by the Vulkan module of its shaders."""
    if _MARK.encode() not in data:
        return data
    blob = parse_blob(data)
    replaced = tuple(_replaced(module, modules) for module in blob.modules)
    return write_blob(Blob(blob.row_ptr, blob.child_indices, replaced))


def _replaced(module: BlobModule, modules: dict[str, dict[str, Shader]]) -> BlobModule:
    if module.kind != "opencl" or module.payload is None or _MARK.encode() not in module.payload:
        return module
    functions, _ = parse_opencl_payload(module.payload)
    mark = next(name for name in functions if name.startswith(_MARK))
    del functions[mark]
    shaders = modules[mark.removeprefix(_MARK)]
    if functions.keys() != shaders.keys():
        raise CompileError(f"functions and shaders differ: {sorted(functions.keys() ^ shaders.keys())}")
    return BlobModule("vulkan", write_vulkan_payload(functions, shaders))
