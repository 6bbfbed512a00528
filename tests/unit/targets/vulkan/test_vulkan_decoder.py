"""The whole demo model in half precision through our shaders, scheduled by TVM's own GPU rules."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from helpers_build import Float
from helpers_vulkan import Built, executor, global_functions, validate, vulkan_target
from safetensors.torch import load_file
from tvm import relax
from tvm.s_tir import dlight
from tvm_ffi import Shape

import awq_compile
from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.models.config import read_config
from awq_compile.models.decoder import export_decoder
from awq_compile.models.parameters import model_parameters
from awq_compile.targets import resolve_target
from awq_compile.targets.vulkan.codegen import build_shaders
from awq_compile.verify.record import LaunchRecorder

DEMO = Path(awq_compile.__file__).parent / "data/demo"
SIZES = CompileOptions(context_window_size=128, prefill_chunk_size=32, max_batch_size=4)
# Written in place: dlight's rules refuse them, and kernels of our own replace them.
UNSCHEDULED = ("apply_logit_bias_inplace", "apply_penalty_inplace", "apply_bitmask_inplace")


def gpu_rules() -> list[Any]:
    gpu = dlight.gpu
    return [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]


class VulkanDecoder(Float):
    """`Float`, but in float16 and with every kernel on the Vulkan device: the VM runs on the CPU."""

    def __init__(self, folder: Path) -> None:
        config, target, t = read_config(folder), vulkan_target(), relax.transform
        module, _ = export_decoder(config, SIZES, "float16", resolve_target("vulkan"))
        for var in list(module.get_global_vars()):
            if var.name_hint in UNSCHEDULED:
                del module[var]
        passes = [t.BundleModelParams("params"), t.LegalizeOps(), t.AnnotateTIROpPattern(), t.FoldConstant()]
        passes += [t.FuseOps(), t.FuseTIR(), t.DeadCodeElimination(), dlight.ApplyDefaultSchedule(*gpu_rules())]
        passes += [t.RewriteDataflowReshape(), t.ToNonDataflow(), t.RemovePurityChecking(), t.CallTIRRewrite()]
        passes += [t.StaticPlanBlockMemory(), t.LowerAllocTensor(), t.KillAfterLastUse(), t.LowerRuntimeBuiltin()]
        passes += [t.ComputePrimValue(), t.VMShapeLower(), t.AttachGlobalSymbol()]
        with target:
            module = tvm.transform.Sequential(passes)(module)
        builder = relax.ExecBuilder()
        kernels = relax.vm_build._filter_tir(relax.vm_build._vmcodegen(builder, module, "bytecode"))
        start = time.monotonic()
        self.built = Built(kernels, target, recorder=LaunchRecorder())
        self.build_seconds = time.monotonic() - start
        self.names = [var.name_hint for var in kernels.get_global_vars()]
        self._executable = relax.vm_build._vmlink(builder, tvm.target.Target("llvm"))
        state = load_file(folder / "model.safetensors")
        parameters = model_parameters(config, QuantScheme.parse("w4g32"))
        arrays = [np.concatenate([state[s].float().numpy() for s in p.sources]) for p in parameters]
        self.params = [tvm.runtime.tensor(a.astype("float16")) for a in arrays]

    def start(self) -> None:
        """Makes the VM, within `launchable`."""
        self.vm = relax.VirtualMachine(self._executable, tvm.cpu())
        shape = (SIZES.max_batch_size, SIZES.context_window_size, SIZES.prefill_chunk_size, SIZES.page_size, 0)
        self.cache = self.vm["create_tir_paged_kv_cache"](*(Shape([size]) for size in shape))


@pytest.fixture(scope="module")
def decoder() -> VulkanDecoder:
    executor("float16", "int64", "int8", "storage16", "storage8")
    return VulkanDecoder(DEMO)


@pytest.fixture(scope="module")
def running(decoder: VulkanDecoder) -> Iterator[VulkanDecoder]:
    def call(name: str) -> Any:
        return lambda *args: decoder.built.call(name, *args)

    functions = {name: call(name) for name in decoder.names}
    with decoder.built.launchable(executor()), global_functions(functions):
        decoder.start()
        yield decoder


def test_every_kernel_is_valid(decoder: VulkanDecoder, tmp_path: Path) -> None:
    """spirv-val finds nothing in any kernel of the model."""
    assert len(decoder.built.shaders) >= 50
    validate(list(decoder.built.shaders.values()), tmp_path)


def test_the_whole_model_agrees_with_the_cpu(running: VulkanDecoder) -> None:
    """Prefill in two chunks, a ragged batch of three, and decoding give the logits of the float32 CPU build."""
    reference = Float(read_config(DEMO), load_file(DEMO / "model.safetensors"), SIZES)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 4096, n).tolist() for n in (40, 5, 17)]
    steps = [
        ("prefill", {0: tokens[0][:24]}, None),
        ("prefill", {0: tokens[0][24:]}, None),
        ("batch_prefill", {1: tokens[1], 2: tokens[2]}, [4, 21]),
        ("batch_decode", {0: [7], 1: [8], 2: [9]}, None),
        ("decode", {1: [11]}, None),
        ("batch_verify", {0: [1, 2, 3], 2: [4]}, None),
    ]
    for model in (running, reference):
        for sequence in range(3):
            model.state("add_sequence", sequence)
    for name, sequences, positions in steps:
        found = running(name, sequences, positions=positions)
        expected = reference(name, sequences, positions=positions)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * scale, err_msg=f"{name} {sequences}")


def test_generation_takes_less_than_the_rest(decoder: VulkanDecoder) -> None:
    """Generating all shaders takes less time than TVM's part of the same build."""
    seconds = decoder.built.generation_seconds
    assert seconds < decoder.build_seconds - seconds


def test_equal_inputs_give_equal_shaders(decoder: VulkanDecoder) -> None:
    """Generating again gives the same words."""
    module, target = decoder.built.lowered[0]
    assert build_shaders(module, target) == decoder.built.shaders
