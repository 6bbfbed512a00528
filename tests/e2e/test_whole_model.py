"""The bundled model through the device kernels of its built libraries: the CPU library's tokens, token for token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tvm
from helpers_models import DEMO
from helpers_vulkan import global_functions
from tokenizers import Tokenizer

from awq_compile.manifest import Dist, file_sha256, open_dist
from awq_compile.targets import resolve_target
from awq_compile.verify.execution import missing
from awq_compile.verify.sidecar import table_path
from awq_compile.verify.whole_model import Prompts, WholeModelVerification, verify_whole_model

TARGETS = ("opencl", "vulkan", "android:adreno")
# What every decoder layer launches: prefill alone and behind a past, decoding alone and of a batch, merging.
EXPECTED = (
    "batch_prefill_ragged_kv_kernel",
    "batch_prefill_paged_kv_kernel",
    "attention_paged_decode_kernel",
    "attention_paged_decode_kernel_1",
    "tir_attention_merge_state_kernel",
    "tir_kv_cache_transpose_append_kernel",
    "fused_rope_kernel",
)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Held-out text: one prompt of 70 tokens, and three of 3, 18 and 8 tokens, across and within pages of 16."""
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode((DEMO / "heldout.txt").read_text()[:2000]).ids
    return Prompts(ids[:70], [ids[100:103], ids[110:128], ids[130:138]])


def run(dist: Dist, name: str, prompts: Prompts, steps: int = 12) -> WholeModelVerification:
    """Skips where nothing runs the target's kernels."""
    target = resolve_target(name)
    if (reason := missing(target)) is not None:
        pytest.skip(reason)
    return verify_whole_model(dist, target, prompts=prompts, steps=steps)


@pytest.mark.parametrize("name", TARGETS)
def test_tokens_are_the_cpu_librarys(dist: Dist, prompts: Prompts, name: str) -> None:
    """Prefill in chunks, decoding, and a ragged batch of three: 54 greedy tokens, every logit within the tolerance."""
    found = run(dist, name, prompts)
    assert found.passed, found.words()
    assert found.tokens == 3 + 12 + 3 + 3 * 12
    assert found.max_difference > 0  # the device computed in half precision: these are not the CPU's own logits
    for kernel in EXPECTED:
        assert any(launched.endswith(kernel) for launched in found.launches), kernel


SAMPLER = {
    "multinomial_from_uniform",
    "argsort_probs",
    "sample_with_top_p",
    "sampler_take_probs",
    "renormalize_by_top_p",
    "sampler_verify_draft_tokens",
}


@pytest.mark.parametrize(("name", "sampler"), [("vulkan", SAMPLER), ("opencl", set())])
def test_the_engine_finds_the_devices_sampler(dist: Dist, name: str, sampler: set[str]) -> None:
    """By name among the library's imports, as MLC's engine looks functions up; on OpenCL it samples on the host."""
    if name not in dist.manifest.libraries:
        pytest.skip(missing(resolve_target(name)) or "")
    # The device's own runtime is not here, and none of it is called.
    nothing = tvm.tirx.build(tvm.IRModule({}), target="llvm")
    with global_functions({f"ffi.Module.load_from_bytes.{name}": lambda _: nothing}):
        vm = tvm.runtime.load_module(str(dist.library(name)))["vm_load_executable"]()
    assert {function for function in SAMPLER if vm.implements_function(function, query_imports=True)} == sampler
    assert vm.implements_function("apply_penalty_inplace", query_imports=True)


def test_broken_device_code_is_caught(dist: Dist, prompts: Prompts, tmp_path: Path) -> None:
    """The code that runs is the library's: norms over 226 instead of 256 elements show in the logits."""
    folder = tmp_path / "broken"
    shutil.copytree(dist.path, folder)
    broken = open_dist(folder)
    if "opencl" not in broken.manifest.libraries:
        pytest.skip(missing(resolve_target("opencl")) or "")
    library = broken.library("opencl")
    before, code = file_sha256(library), library.read_bytes()
    assert code.count(b"/ 2.560000e+02f") > 1
    library.write_bytes(code.replace(b"/ 2.560000e+02f", b"/ 2.260000e+02f"))
    tables = table_path(library)
    tables.write_text(tables.read_text().replace(before, file_sha256(library)))
    found = run(broken, "opencl", prompts, steps=1)
    assert not found.passed and found.max_difference > 5 * found.tolerance, found.words()


def test_a_launch_beyond_the_code_is_caught(dist: Dist, prompts: Prompts, tmp_path: Path) -> None:
    """The launches are those of the tables: an append that starts one block too few leaves a hole in the cache."""
    folder = tmp_path / "broken"
    shutil.copytree(dist.path, folder)
    broken = open_dist(folder)
    if "opencl" not in broken.manifest.libraries:
        pytest.skip(missing(resolve_target("opencl")) or "")
    path = table_path(broken.library("opencl"))
    data = json.loads(path.read_text())
    (launch,) = (s[1] for s in data["tables"]["tir_kv_cache_transpose_append"]["body"] if s[0] == "launch")
    launch["grid"][0] = ["sub", launch["grid"][0], 1]
    path.write_text(json.dumps(data))
    found = run(broken, "opencl", prompts, steps=1)
    assert not found.passed
