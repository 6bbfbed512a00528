"""Small Relax modules for the passes, golden IR, and running a module on the VM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax
from tvm.relax.frontend import nn

from awq_compile.formats import QuantSpec

GOLDEN = Path(__file__).parent / "golden"


def check_golden(name: str, module: Any) -> None:
    """The module's script equals tests/golden/NAME.txt; `UPDATE_GOLDEN=1` rewrites it."""
    path, text = GOLDEN / f"{name}.txt", module.script(show_meta=False) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; look at the change, then UPDATE_GOLDEN=1"


class Block(nn.Module):  # type: ignore[misc]
    """A tied embedding, a biased linear with a residual, a gated MLP: everything the passes rewrite."""

    def __init__(self) -> None:
        self.embed = nn.Embedding(50, 64)
        self.mix = nn.Linear(64, 64, bias=True)
        self.gate_up = nn.Linear(64, 2 * 96, bias=False)
        self.down = nn.Linear(96, 64, bias=False)

    def run(self, ids: Any) -> Any:
        """(n,) int32 → (n, 50)."""
        x = self.embed(ids)
        x = self.mix(x) + x
        gate, up = nn.op.split(self.gate_up(x), 2, axis=-1)
        x = self.down(nn.op.silu(gate) * up) + x
        return nn.op.matmul(x, nn.op.permute_dims(self.embed.weight))


def block_module() -> Any:
    """`Block.run`, exported with plain parameters."""
    model = Block()
    spec = nn.spec.ModuleSpec(
        model,
        ["run"],
        [
            nn.spec.MethodSpec(
                model.run, ["ids"], [nn.spec.Tensor(["n"], "int32")], param_mode="plain", effect_mode="none"
            )
        ],
    )
    return model.export_tvm(spec)[0]


def block_plan(spec: QuantSpec) -> dict[str, QuantSpec]:
    """Every matrix of `Block`."""
    return {f"{name}.weight": spec for name in ("embed", "mix", "gate_up", "down")}


def run_module(module: Any, arguments: list[npt.NDArray[Any]], function: str = "run") -> npt.NDArray[Any]:
    """Compiles a module without schedules and calls one function."""
    from awq_compile.compiler import lower_passes, plan_passes, vm_passes

    target = tvm.target.Target("llvm")
    with target:
        passes = [p for p in lower_passes() if p.info.name != "BundleModelParams"]
        module = tvm.transform.Sequential([*passes, *plan_passes(), *vm_passes()])(module)
        executable = relax.build(module, target=target, relax_pipeline=None)
    vm = relax.VirtualMachine(executable, tvm.cpu())
    result = vm[function](*(tvm.runtime.tensor(a) for a in arguments))
    return np.asarray(result.numpy())
