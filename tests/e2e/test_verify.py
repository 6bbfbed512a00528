"""Every kernel of every preset is executed and right; faults put into emitted code, tables and blobs are caught."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_models import DEMO

from awq_compile.compiler import compile_library, model_lib, system_lib_prefix
from awq_compile.errors import ArtifactError
from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.models.config import read_config
from awq_compile.targets import resolve_target
from awq_compile.verify.device_code import DeviceModule, library_code
from awq_compile.verify.execution import missing
from awq_compile.verify.kernels import KernelVerification, verify_code, verify_kernels
from awq_compile.verify.mutants import Mutant, definition
from awq_compile.verify.mutation_run import PRESETS, Subject, draw, judge_mutant
from awq_compile.verify.offline import cuda_resources, spirv_errors
from awq_compile.verify.sidecar import Sidecar, read_sidecar, table_path

OPTIONS = CompileOptions(context_window_size=256, prefill_chunk_size=64, max_batch_size=4)
OTHER_PAGES = {"android": replace(OPTIONS, page_size=32)}
SCHEME = QuantScheme.parse("w4g32")
LINEAR = "qmatmul_w4g32_n256_k256_residual_float16"


def build_and_verify(name: str, folder: Path) -> tuple[Path, KernelVerification]:
    """In a process of its own."""
    target, config, options = resolve_target(name), read_config(DEMO), OTHER_PAGES.get(name, OPTIONS)
    library = folder / name.replace(":", "-") / f"lib{target.library_suffix}"
    library.parent.mkdir()
    compile_library(config, SCHEME, target, options, library)
    return library, verify_kernels(library, config, SCHEME, target, options)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, KernelVerification]]:
    """The demo model for every preset that can be verified here, two at a time."""
    folder = tmp_path_factory.mktemp("libraries")
    for name in PRESETS:
        if (reason := missing(resolve_target(name))) is not None:
            pytest.fail(f"{name}: {reason}")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = {name: pool.submit(build_and_verify, name, folder) for name in PRESETS}
        return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_every_kernel_is_right(built: dict[str, tuple[Path, KernelVerification]], name: str) -> None:
    """All kernels of the library's own blob were executed and are within their bounds."""
    library, found = built[name]
    assert found.passed, found.failures
    kernels = {kernel for module in library_code(library) for kernel in module.functions}
    assert {row.kernel for row in found.rows} == kernels and len(kernels) > 50
    assert all(row.launches for row in found.rows)
    linears = [row for row in found.rows if row.kind == "linear"]
    assert len(linears) >= 15 and {row.oracle for row in linears} == {"float64"}


def test_an_app_finds_its_library(built: dict[str, tuple[Path, KernelVerification]]) -> None:
    """The objects of an archive define the symbol that MLC's runtime looks for, also for a short file name."""
    import lief

    library = built["android"][0]
    with tarfile.open(library) as archive:
        objects = [lief.ELF.parse(archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    defined = {symbol.name for one in objects if one for symbol in one.symbols if symbol.shndx}
    assert f"{model_lib(library)}___tvm_ffi__library_bin" in defined


@pytest.fixture(scope="module")
def subjects(built: dict[str, tuple[Path, KernelVerification]]) -> Callable[[str], Subject]:
    """The built libraries, taken apart."""
    from awq_compile.verify.roles import roles

    made: dict[str, Subject] = {}

    def subject(name: str) -> Subject:
        if name not in made:
            library, target = built[name][0], resolve_target(name)
            prefix = system_lib_prefix(library) if target.system_lib else ""
            known = roles(read_config(DEMO), SCHEME, target, OTHER_PAGES.get(name, OPTIONS))
            made[name] = Subject(target, library_code(library)[0], read_sidecar(library), known, prefix)
        return made[name]

    return subject


def text_of(module: DeviceModule, source: str) -> str:
    return source or bytes(module.code).decode()


def changed(subject: Subject, kernel: str, old: str, new: str, count: int = 1) -> Mutant:
    """The code with `old` replaced within one kernel."""
    module, source = subject.module, subject.sidecar.source
    kind = module.kind
    text = bytes(module.kernels[kernel]).decode() if kind == "metal" else text_of(module, source)
    start, stop = definition(kind, text, kernel)
    body = text[start:stop]
    assert old in body, body[:3000]
    text = text[:start] + body.replace(old, new, count) + text[stop:]
    if kind == "metal":
        return Mutant(kernel, "planted", new, replace(module, kernels={**module.kernels, kernel: text.encode()}))
    if kind == "cuda":
        return Mutant(kernel, "planted", new, module, text)
    return Mutant(kernel, "planted", new, replace(module, code=text.encode()))


@pytest.mark.parametrize("kind", ["opencl", "cuda:sm_80"])
def test_a_wrong_nibble_order_is_caught(subjects: Callable[[str], Subject], kind: str) -> None:
    """Code 1 of a word read where code 2 belongs."""
    subject = subjects(kind)
    wide = ">> (uint)8"
    kernel = f"{LINEAR}_kernel"
    text = text_of(subject.module, subject.sidecar.source)
    start, stop = definition(subject.module.kind, text, kernel)
    assert wide in text[start:stop], text[start:stop][:2500]
    assert "differ" in judge_mutant(subject, changed(subject, kernel, wide, wide.replace("8", "12")))


@pytest.mark.parametrize(
    ("kind", "barrier"), [("opencl", "barrier(CLK_LOCAL_MEM_FENCE);"), ("cuda:sm_80", "__syncthreads();")]
)
def test_a_missing_barrier_is_caught(subjects: Callable[[str], Subject], kind: str, barrier: str) -> None:
    """The tiled kernel reads its tile before all threads have written it."""
    assert judge_mutant(subjects(kind), changed(subjects(kind), f"{LINEAR}_kernel_2", barrier, ";"))


def test_an_off_by_one_tail_is_caught(subjects: Callable[[str], Subject]) -> None:
    """One row too many, in the launch table: a write behind the result."""
    subject = subjects("opencl")
    table = json.loads(json.dumps(subject.sidecar.tables[LINEAR]))
    launches = json.dumps(table).count('"launch"')
    text = json.dumps(table)
    assert launches == 3

    def more_rows(value: Any) -> Any:
        """M is one larger wherever a kernel is told of it."""
        if isinstance(value, dict) and "scalars" in value:
            return {**value, "scalars": [["add", s, 1] for s in value["scalars"]]}
        if isinstance(value, dict):
            return {k: more_rows(v) for k, v in value.items()}
        return [more_rows(v) for v in value] if isinstance(value, list) else value

    tables = {LINEAR: {**table, "body": more_rows(table["body"])}}
    assert json.dumps(tables) != text
    found = verify_code([subject.module], Sidecar(tables), subject.known, subject.target, only=LINEAR)
    assert not found.passed


def test_a_swapped_scale_is_caught(subjects: Callable[[str], Subject]) -> None:
    """Each group takes its neighbour's scale."""
    subject = subjects("opencl")
    assert "differ" in judge_mutant(subject, changed(subject, f"{LINEAR}_kernel", "q_scale_ptr[", "q_scale_ptr[1^"))


def test_swapped_arguments_in_a_table_are_caught(subjects: Callable[[str], Subject]) -> None:
    """Residual and result change places."""
    subject = subjects("opencl")
    text = json.dumps(subject.sidecar.tables[LINEAR]["body"])
    text = text.replace('"residual"', '"?"').replace('"y"', '"residual"').replace('"?"', '"y"')
    tables = {LINEAR: {**subject.sidecar.tables[LINEAR], "body": json.loads(text)}}
    found = verify_code([subject.module], Sidecar(tables), subject.known, subject.target, only=LINEAR)
    assert not found.passed


def test_an_unexecuted_kernel_is_a_failure(subjects: Callable[[str], Subject]) -> None:
    """Without its launch table a planned linear is missed, and so are its kernels."""
    subject = subjects("opencl")
    kept = {"reshape": subject.sidecar.tables["reshape"]}
    found = verify_code([subject.module], Sidecar(kept), subject.known, subject.target)
    assert any(LINEAR in problem for problem in found.problems)
    assert sum(row.passed for row in found.rows) == 1
    assert all(row.why == "no case executes it" for row in found.rows if not row.passed)


def test_random_mutants_are_caught(subjects: Callable[[str], Subject]) -> None:
    """A constant, operands and an index on each preset; `scripts/mutate_kernels` draws sixty, barriers among them."""
    survivors = []
    for name in PRESETS:
        subject = subjects(name)
        for mutant in draw(subject, 3, seed=5, operators=("constant", "swap", "index")):
            if not judge_mutant(subject, mutant):
                survivors.append(f"{name} {mutant.kernel}: {mutant.what}")
    assert len(survivors) <= 1, survivors  # some change nothing that any thread sees


def test_shaders_are_valid(subjects: Callable[[str], Subject]) -> None:
    """spirv-val finds nothing in any shader of the library."""
    assert spirv_errors(subjects("vulkan").module) == []


def test_the_gemv_does_not_spill(subjects: Callable[[str], Subject]) -> None:
    """Registers of the quantised GEMV suffice on Ampere, Ada and Hopper."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    subject = subjects("cuda:sm_80")
    text, gemv = subject.sidecar.source, f"{LINEAR}_kernel"
    for kernel in subject.module.functions:
        if kernel != gemv:
            start, stop = definition("cuda", text, kernel)
            text = text[: text.rindex('extern "C"', 0, start)] + text[stop:]
    text = re.sub(r'^extern "C" __global__ [^{};]*;$', "", text, flags=re.MULTILINE)  # declarations of the others
    found = cuda_resources(text, ("sm_80", "sm_89", "sm_90"))
    assert {r.arch for r in found if r.kernel == gemv} == {"sm_80", "sm_89", "sm_90"}
    assert not any(r.spill_bytes for r in found), found


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("is not a file", lambda data: {**data, "format": "other"}),
    ("is not a file", lambda data: {**data, "version": 99}),
    ("belongs to the library", lambda data: {**data, "library": "0" * 64}),
    ("belongs to the source", lambda data: {**data, "source": "0" * 64}),
    ("tables is", lambda data: {**data, "tables": []}),
    ("malformed", lambda data: {**data, "tables": {"reshape": {"name": "other"}}}),
    ("malformed", lambda data: {**data, "tables": {"f": {"name": "f", "params": [], "body": [["run", "rm"]]}}}),
    ("malformed", lambda data: {**data, "tables": {"f": {"name": "f", "params": [], "body": [["let", "a", "b"]]}}}),
    ("not JSON", lambda data: "{"),
    ("nested too deeply", lambda data: "[" * 100_000),
]


@pytest.mark.parametrize(("message", "damage"), HOSTILE)
def test_hostile_tables_are_refused(
    built: dict[str, tuple[Path, KernelVerification]], tmp_path: Path, message: str, damage: Callable[[Any], Any]
) -> None:
    """Nothing of a table is run before all of it has been checked."""
    original = built["opencl"][0]
    library = tmp_path / original.name
    library.write_bytes(original.read_bytes())
    data = damage(json.loads(table_path(original).read_text()))
    table_path(library).write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ArtifactError, match=message):
        read_sidecar(library)


def test_hostile_blobs_are_refused(built: dict[str, tuple[Path, KernelVerification]], tmp_path: Path) -> None:
    """Cut or changed libraries stop with `ArtifactError`, never with another exception."""
    original = built["opencl"][0].read_bytes()
    rng = np.random.default_rng(0)
    at = original.rindex(b"opencl")
    for trial in range(30):
        data = bytearray(original)
        if trial % 3 == 0:
            data = data[: int(rng.integers(1, len(data)))]
        else:
            for place in at + rng.integers(-64, 64, 4):
                data[place] = int(rng.integers(0, 256))
        library = tmp_path / f"{trial}.so"
        library.write_bytes(bytes(data))
        try:
            library_code(library)
        except ArtifactError:
            continue


def test_a_table_that_never_ends_is_refused(subjects: Callable[[str], Subject]) -> None:
    """A workspace of a billion gigabytes is a failure of that function, not of this process."""
    subject = subjects("opencl")
    table = subject.sidecar.tables["reshape"]
    tables = {"reshape": {**table, "body": [["alloc", "w", "float32", [1 << 50]], *table["body"]]}}
    found = verify_code([subject.module], Sidecar(tables), subject.known, subject.target, only="reshape")
    assert not found.passed and "cannot be followed" in found.rows[0].why


def test_two_build_orders_give_equal_bytes(tmp_path: Path) -> None:
    """TVM's schedules change the module they are given: no target must see another's."""
    config = read_config(DEMO)
    bytes_of: dict[str, list[bytes]] = {}
    for number, order in enumerate((("vulkan", "opencl"), ("opencl", "vulkan"))):
        for name in order:
            target = resolve_target(name)
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            library = folder / f"demo-{name}{target.library_suffix}"
            compile_library(config, SCHEME, target, OPTIONS, library)
            bytes_of.setdefault(name, []).append(library.read_bytes() + table_path(library).read_bytes())
    assert all(first == second for first, second in bytes_of.values())
