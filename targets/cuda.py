"""NVIDIA GPUs: CUDA C++ by TVM's generator, compiled by nvcc on PATH, else by NVRTC from PyPI.

TVM's own module carries the source, and its runtime compiles that through Python when it loads: MLC's engine has no
Python. At export, machine code takes the source's place.

`cuda` is `cuda:sm_80`; `cuda:sm_90`, or several in one library, `cuda:sm_80+sm_90`. `@aarch64-linux-gnu` behind
it gives a library for Jetson and Grace.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

from awq_compile.errors import AwqCompileError, CompileError, EnvironmentMissingError, UsageError
from awq_compile.formats import Float16Spec, QuantSpec
from awq_compile.problem import MatmulProblem
from awq_compile.schedules import (
    ColumnGemvSchedule,
    DecodeAttentionSchedule,
    LinearSchedule,
    MatrixGemmSchedule,
    MatrixGemvSchedule,
    SimtGemvSchedule,
    StagedMatrixSchedule,
    WarpgroupSchedule,
)
from awq_compile.targets.cuda_launch import tagged, with_waits
from awq_compile.targets.cuda_ptx import MARK, WARPGROUP_MARK, device_functions
from awq_compile.targets.cuda_source import with_digest
from awq_compile.targets.gpu import GpuTarget, GpuTemplates, HardwareLimits, tvm_limits
from awq_compile.targets.link import library_suffix, llvm_triple
from awq_compile.targets.vulkan.blob import (
    Blob,
    BlobModule,
    parse_blob,
    parse_opencl_payload,
    write_blob,
    write_code_payload,
)

PACK: Final = "codegen.codegen_blob"
ARCHS: Final = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
_LIMITS: Final = HardwareLimits(
    max_threads=1024,
    shared_bytes=48 << 10,  # static; more needs an opt-in at every launch
    subgroup=32,
    registers=255,
    arguments=512,
    source="NVIDIA CUDA C++ Programming Guide, 'Technical Specifications per Compute Capability', 7.5 to 12.0",
)

# Two blocks for each of an H200's 132 multiprocessors; the rest is by a sweep there, `docs/performance.md`.
_DECODE_ATTENTION: Final = DecodeAttentionSchedule(
    threads=256,
    key_threads=4,
    keys=2,
    values=4,
    vector_bytes=16,
    positions=512,
    blocks=264,
    subgroup=_LIMITS.subgroup,
    shared_bytes=_LIMITS.shared_bytes,
)


def _templates(arch: str) -> GpuTemplates:
    """Tensor cores take K = 16 at a time from sm_80 on.

    Few rows by an H200, docs/performance.md. Before sm_90 conversions to float are slower (CUDA C++ Programming Guide,
    arithmetic throughput).
    """
    magic = int(arch.removeprefix("sm_")) < 90
    return GpuTemplates(
        SimtGemvSchedule(256, 1, 4, 16, magic=magic),
        SimtGemvSchedule(64, 2, 4, 16, batch=4, magic=magic),
        MatrixGemmSchedule(64, 64, 64, 2, 2, unit=8, instruction=f"m16n8k{_mma_k(arch)}", magic=True),
        ColumnGemvSchedule(32, 8, 1, unit=8, magic=True),
        SimtGemvSchedule(32, 4, 2, 16),
    )


# Multiprocessors of an H100 and an H200. The rules below are by an H200, `docs/performance.md`.
_UNITS: Final = 132


def _filling(problem: MatmulProblem, warps: int, shapes: tuple[MatrixGemvSchedule, ...]) -> MatrixGemvSchedule:
    """The first of which a multiprocessor gets at most so many warps; else the last."""
    groups = MatrixGemvSchedule.groups(problem)

    def held(s: MatrixGemvSchedule) -> bool:
        return -(-problem.weight_rows // (16 * s.tiles)) * s.warps <= warps * _UNITS

    found = next(filter(held, shapes), shapes[-1])
    return replace(found, warps=min(groups, found.warps))


def _one(problem: MatmulProblem) -> MatrixGemvSchedule:
    """One row: 16 warps to a multiprocessor, or 32 that take two groups each."""
    groups, narrow = MatrixGemvSchedule.groups(problem), problem.weight_rows <= 32 * _UNITS
    if narrow and groups <= 32:
        return MatrixGemvSchedule(min(groups, 16), 1, resident=2)
    shapes = ((16, 2, 1, 1, 1), (8, 2, 1, 1, 2), (4, 2, 1, 1, 4))
    return _filling(problem, 16, tuple(MatrixGemvSchedule(*fields) for fields in shapes))


def _pair(problem: MatmulProblem) -> MatrixGemvSchedule:
    """Two rows: 32 warps to a multiprocessor."""
    shapes = ((16, 1, 1, 1, 2), (8, 1, 1, 1, 4), (4, 1, 1, 1, 4))
    return _filling(problem, 32, tuple(MatrixGemvSchedule(*fields) for fields in shapes))


def _quad(problem: MatmulProblem) -> MatrixGemvSchedule:
    """3 or 4 rows: as two, but for a wide W."""
    shapes = ((16, 1, 1, 1, 2), (8, 1, 1, 1, 4), (4, 2, 1, 1, 4))
    return _filling(problem, 32, tuple(MatrixGemvSchedule(*fields) for fields in shapes))


def _few(problem: MatmulProblem) -> MatrixGemvSchedule:
    """5 to 8 rows: 16 warps to a multiprocessor, but for a wide W."""
    widest = (4, 4, 1, 2, 1) if problem.k >= 8192 else (4, 1, 1, 1, 1)
    shapes = ((16, 2, 1, 1, 1), (8, 2, 1, 1, 1), (4, 2, 1, 1, 1), widest)
    return _filling(problem, 16, tuple(MatrixGemvSchedule(*fields) for fields in shapes))


def _floats(problem: MatmulProblem) -> dict[str, MatrixGemvSchedule]:
    """By bucket, for float16 weights, as those of an LM head: 16 warps to a multiprocessor."""
    groups = MatrixGemvSchedule.groups(problem)
    few = MatrixGemvSchedule(min(groups, 8), resident=2)
    medium = MatrixGemvSchedule(min(groups, 4), 2, columns=2, resident=4)
    return {**dict.fromkeys(("gemv", "pair", "quad", "small"), few), "medium": medium}


def _medium(problem: MatmulProblem) -> MatrixGemvSchedule:
    """9 to 16 rows, in two columns."""
    shapes = ((16, 2, 2), (8, 2, 2, 2), (4, 4, 2, 1, 1))
    return _filling(problem, 16, tuple(MatrixGemvSchedule(*fields) for fields in shapes))


def _broad(problem: MatmulProblem) -> MatrixGemvSchedule:
    """17 to 32 rows: blocks of 16, so that W is read twice."""
    groups = problem.k // 128
    if problem.weight_rows < 12288:
        return MatrixGemvSchedule(min(groups, 8), 2, columns=2, stages=2 if groups >= 8 else 1)
    return MatrixGemvSchedule(min(groups, 4), 4, columns=2)


def _large(problem: MatmulProblem) -> MatrixGemvSchedule:
    """33 to 64 rows. The wider W is, the fewer warps share its groups, and the more rows of x each takes.

    With zero points to keep, or groups that two warps share unevenly, four tiles by four columns take more registers
    than exist.
    """
    groups = problem.k // 128
    if problem.weight_rows < 6144:
        return MatrixGemvSchedule(min(groups, 4), 4, columns=2)
    warps = min(groups, 4 if problem.weight_rows < 12288 else 2)
    plain = isinstance(problem.spec, QuantSpec) and problem.spec.symmetric and groups % warps == 0
    return MatrixGemvSchedule(warps, 4 if plain else 2, columns=4)


def _wide(problem: MatmulProblem) -> StagedMatrixSchedule | None:
    """65 to 256 rows: where W is narrow they make few blocks, so smaller ones."""
    return StagedMatrixSchedule(4, 2, 8, 3) if problem.weight_rows < 12288 else None


def _warpgroups(problem: MatmulProblem) -> dict[str, Any]:
    """By bucket: about a block for each multiprocessor. The narrower W is, the more slices of K share its groups."""
    rows = problem.weight_rows
    if rows < 12288:
        if rows >= 6144:
            large = WarpgroupSchedule(1, 1, columns=8, slices=4)
        elif problem.k <= 8192:
            large = WarpgroupSchedule(1, 1, columns=8, slices=4, ahead=2)
        else:
            large = WarpgroupSchedule(1, 1, columns=4, slices=4, stages=5, ahead=2)
        wide = WarpgroupSchedule(1, 1, columns=16, slices=4, stages=3)
    elif rows < 24576:
        large, wide = (
            WarpgroupSchedule(2, 1, columns=8, slices=2, stages=6),
            WarpgroupSchedule(2, 1, columns=16, slices=2),
        )
    else:
        plain = isinstance(problem.spec, QuantSpec) and problem.spec.symmetric  # else zero points wait as well
        large = WarpgroupSchedule(4, 1, columns=8, stages=8, ahead=4 if plain else 2)
        wide = WarpgroupSchedule(1, 2, columns=16, stages=6)
    found = {"large": large, "wide": wide, "gemm": WarpgroupSchedule(2, 1, columns=32)}
    if rows >= 6144:
        tiles, stages, ahead = (1, 6, 2) if rows < 12288 else (2, 8, 1)
        found["broad"] = WarpgroupSchedule(1, tiles, columns=4, slices=4, stages=stages, ahead=ahead)
    return {bucket: _sharing(s, problem.k // 128) for bucket, s in found.items()}


def _sharing(s: WarpgroupSchedule, groups: int) -> WarpgroupSchedule:
    """With as many slices as share the groups evenly, and no more groups ahead than one has."""
    slices, ahead = s.slices, s.ahead
    while groups % slices:
        slices //= 2
    while ahead > groups // slices:
        ahead //= 2
    return replace(s, slices=slices, ahead=ahead)


def _mma_k(arch: str) -> int:
    return 8 if arch == "sm_75" else 16


@dataclass(frozen=True)
class CudaTarget(GpuTarget):
    """`archs`: the compute capabilities that the library has code for."""

    archs: tuple[str, ...] = ()

    def rule(self, problem: MatmulProblem) -> LinearSchedule:
        """W decoded in registers for tensor cores, where the format and the oldest architecture allow it."""
        chosen = super().rule(problem)
        if not MatrixGemvSchedule.groups(problem) or _mma_k(self.archs[0]) < 16:
            return chosen
        if isinstance(problem.spec, Float16Spec):
            return replace(chosen, **_floats(problem))
        gemm = StagedMatrixSchedule(8, 2, 16)
        chosen = LinearSchedule(
            gemv=_one(problem),
            pair=_pair(problem),
            quad=_quad(problem),
            small=_few(problem),
            medium=_medium(problem),
            broad=_broad(problem),
            large=_large(problem),
            gemm=gemm,
        )
        if self.archs != ("sm_90",):
            return replace(chosen, wide=_wide(problem))
        return replace(chosen, **_warpgroups(problem))

    @contextmanager
    def building(self) -> Iterator[None]:
        """Within the block, what TVM exports has machine code."""
        import tvm_ffi

        pack, refused = tvm_ffi.get_global_func(PACK), []

        def with_code(data: bytes, *rest: Any) -> Any:
            try:
                return pack(self.with_machine_code(data), *rest)
            except AwqCompileError as error:
                refused.append(error)
                raise

        tvm_ffi.register_global_func(PACK, with_code, override=True)
        try:
            yield
        except RuntimeError as error:  # what TVM makes of those
            raise (refused[0] if refused else error) from None
        finally:
            tvm_ffi.register_global_func(PACK, pack, override=True)

    def with_machine_code(self, data: bytes) -> bytes:
        """A module blob whose CUDA modules are compiled."""
        blob = parse_blob(data)
        return write_blob(Blob(blob.row_ptr, blob.child_indices, tuple(map(self._compiled, blob.modules))))

    def _compiled(self, module: BlobModule) -> BlobModule:
        if module.kind != "cuda" or module.payload is None:
            return module
        functions, source = parse_opencl_payload(module.payload)
        text = with_waits(source.decode())
        code, form = self.machine_code(with_digest(text))
        return BlobModule("cuda", write_code_payload(form, tagged(functions, text, self.archs[0]), code))

    def machine_code(self, source: str) -> tuple[bytes, str]:
        """(code, format) of CUDA C++ for all architectures."""
        source, archs = with_device_functions(source, self.archs[0]), machine_archs(source, self.archs)
        if shutil.which("nvcc"):
            return nvcc(source, archs), "fatbin"
        self.check_tools()
        return nvrtc(source, archs[0]), "cubin"

    def check_tools(self) -> None:
        """nvcc, or for one architecture NVRTC and its headers."""
        super().check_tools()
        if shutil.which("nvcc"):
            return
        if len(self.archs) > 1:
            raise EnvironmentMissingError(
                f"{self.name}: code for several architectures needs nvcc on PATH", hint="install the CUDA toolkit"
            )
        _nvrtc_tools()


def cuda_target(argument: str, host: str) -> CudaTarget:
    """`cuda`, `cuda:sm_90`, `cuda:sm_80+sm_90`."""
    archs = tuple(dict.fromkeys(argument.split("+"))) if argument else ("sm_80",)
    for arch in archs:
        if arch not in ARCHS:
            raise UsageError(f"cuda:{argument}: unknown architecture {arch!r}", hint=f"known: {', '.join(ARCHS)}")
    archs = tuple(sorted(archs, key=lambda a: int(re.sub(r"\D", "", a))))
    host = host or "x86_64-linux-gnu"
    return CudaTarget(
        name=f"cuda:{'+'.join(archs)}" + ("" if host == "x86_64-linux-gnu" else f"@{host}"),
        # The oldest architecture decides what the generated source may use.
        tvm_target={
            "kind": "cuda",
            "arch": archs[0],
            **tvm_limits(_LIMITS),
            "host": {"kind": "llvm", "mtriple": llvm_triple(host)},
        },
        host=host,
        dtype="float16",
        library_suffix=library_suffix(host),
        system_lib=False,
        default_scheme="w4g128",
        orders=("NK", "KN"),
        machine=f"cuda-{archs[0]}",
        runs_here=False,
        limits=_LIMITS,
        templates=_templates(archs[0]),
        decode_attention=_DECODE_ATTENTION,
        mma_attention=_mma_k(archs[0]) == 16,
        archs=archs,
    )


def with_device_functions(source: str, arch: str) -> str:
    """Kernels as nvcc takes them: with our inline PTX in front."""
    if MARK not in source:
        return source
    source = with_resident_blocks(source)
    warpgroups = WARPGROUP_MARK in source
    if warpgroups:  # swizzled stages repeat every 1024 bytes
        source, found = re.subn(r"(extern __shared__ (?:__align__|alignas))\(\d+\)", r"\1(1024)", source)
        if not found:
            raise CompileError("the CUDA source uses wgmma, and no dynamic shared memory is declared in it")
    return device_functions(_mma_k(arch), warpgroups=warpgroups) + source


def with_resident_blocks(source: str) -> str:
    """What a kernel asks for by `awq_resident` becomes its launch bound."""
    kernel = r'^extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\([^;{}()]*\) \{$(.*?)^\}'
    asked = 0
    for name, body in re.findall(kernel, source, re.MULTILINE | re.DOTALL):
        if (blocks := re.search(r"^  awq_resident<(\d+)>\(\);", body, re.MULTILINE)) is not None:
            source = re.sub(rf"(__launch_bounds__\(\d+)(\) {name}\()", rf"\1, {blocks[1]}\2", source)
            asked += 1
    if asked != source.count("awq_resident<"):
        raise CompileError("a kernel in the CUDA source asks for resident blocks and has no launch bound")
    return source


def machine_archs(source: str, archs: tuple[str, ...]) -> tuple[str, ...]:
    """What to compile for: wgmma is in sm_90a alone, whose code runs on every device of compute capability 9.0."""
    return tuple("sm_90a" if arch == "sm_90" and WARPGROUP_MARK in source else arch for arch in archs)


def nvcc(source: str, archs: tuple[str, ...]) -> bytes:
    """A fatbin with machine code for each architecture."""
    with tempfile.TemporaryDirectory() as folder:
        code, out = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        code.write_text(source, encoding="utf-8")
        targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in archs]
        command = ["nvcc", "-w", "-fatbin", "--no-compress", "-O3", "-std=c++17", *targets, "-o", str(out), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise CompileError(
                f"nvcc refused the kernels for {', '.join(archs)}: {done.stderr.strip()[:2000]}",
                hint="nvcc --list-gpu-arch shows what this nvcc knows",
            )
        return out.read_bytes()


def _cuda_headers() -> list[Path]:
    """Folders of `cuda_fp16.h`, what it includes, and the C++ library, in the packages that pip installs."""
    found = []
    for package, header in (
        ("nvidia-cuda-runtime", "cuda_fp16.h"),
        ("nvidia-cuda-crt", "crt/host_defines.h"),
        ("nvidia-cuda-cccl", "cuda/std/cstdint"),
    ):
        files = [f for f in distribution(package).files or [] if f.as_posix().endswith(f"/{header}")]
        if not files:
            raise PackageNotFoundError(f"{package} without {header}")
        found.append(Path(str(files[0].locate())).parents[header.count("/")])
    return list(dict.fromkeys(found))


def _nvrtc_tools() -> tuple[Any, list[Path]]:
    """(bindings, folders of headers)."""
    try:
        from cuda.bindings import nvrtc as api

        api.nvrtcVersion()
        return api, _cuda_headers()
    except (ImportError, PackageNotFoundError, RuntimeError) as missing:  # Runtime: no library
        raise EnvironmentMissingError(
            f"CUDA needs a compiler: there is no nvcc on PATH, and NVRTC is not complete ({missing})",
            hint="pip install 'awq-compile[cuda]', or install the CUDA toolkit",
        ) from None


def nvrtc(source: str, arch: str) -> bytes:
    """Machine code by NVRTC, where there is no nvcc."""
    api, folders = _nvrtc_tools()
    _, program = api.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    options += [f"--include-path={folder}".encode() for folder in folders]
    (error,) = api.nvrtcCompileProgram(program, len(options), options)
    if int(error) != 0:
        _, size = api.nvrtcGetProgramLogSize(program)
        log = b" " * size
        api.nvrtcGetProgramLog(program, log)
        raise CompileError(f"NVRTC refused the kernels for {arch}: {log.decode(errors='replace').strip()[:2000]}")
    _, size = api.nvrtcGetCUBINSize(program)
    code = b" " * size
    api.nvrtcGetCUBIN(program, code)
    return bytes(code)
