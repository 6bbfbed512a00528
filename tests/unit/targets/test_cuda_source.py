"""CUDA machine code names the source it was compiled from."""

from __future__ import annotations

import shutil

import pytest

from awq_compile.errors import ArtifactError
from awq_compile.targets.cuda import nvcc
from awq_compile.targets.cuda_source import check_source, digests, with_digest

SOURCE = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] += 1.0f; }\n'
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@needs_nvcc
def test_each_architecture_in_a_fatbin_carries_the_digest() -> None:
    source = with_digest(SOURCE)
    code = nvcc(source, ("sm_80", "sm_90"))
    assert len(digests(code, "fatbin")) == 2
    check_source(source, code, "fatbin")
    with pytest.raises(ArtifactError, match="compiled from another source"):
        check_source(with_digest(SOURCE.replace("1.0f", "2.0f")), code, "fatbin")
    for cut in (3, 40, len(code) // 2):
        with pytest.raises(ArtifactError):
            digests(code[:cut], "fatbin")


@needs_nvcc
def test_machine_code_without_a_digest_is_refused() -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        check_source(with_digest(SOURCE), nvcc(SOURCE, ("sm_80",)), "fatbin")


def test_a_source_that_was_edited_is_refused() -> None:
    with pytest.raises(ArtifactError, match="changed after it was compiled"):
        check_source(with_digest(SOURCE).replace("1.0f", "2.0f"), b"", "fatbin")
    with pytest.raises(ArtifactError, match="does not end in"):
        check_source(SOURCE, b"", "fatbin")


def test_ptx_and_plain_source() -> None:
    source = with_digest(SOURCE)
    numbers = source.partition("{")[2].rpartition("{")[2].partition("}")[0]
    ptx = f".visible .global .align 1 .b8 awq_compile_source_sha256[32] = {{{numbers}}};".encode()
    check_source(source, ptx, "ptx")
    check_source(source, source.encode(), "cuda")
    with pytest.raises(ArtifactError, match="not the one that lies beside it"):
        check_source(source, SOURCE.encode(), "cuda")
