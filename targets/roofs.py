"""What devices can do at most, by their data sheets: for ranking schedules of a device that is not here.

A preset stands for many devices; its row is a common one of them. Where the device is at hand, its read bandwidth
and its rate of multiply-adds are measured instead (`tuning.devices`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Roof:
    """`bytes_per_second` of reads from memory; `flops_per_second` in float32 with a multiply-add as two;
    `matrix_flops_per_second` of its matrix units, 0 where there are none; `units`: cores or multiprocessors.
    """

    bytes_per_second: float
    flops_per_second: float
    matrix_flops_per_second: float
    units: int
    source: str


_ROOFS: Final = {
    "cuda:sm_75": Roof(320e9, 8.1e12, 65e12, 40, "NVIDIA T4 data sheet"),
    "cuda:sm_80": Roof(1555e9, 19.5e12, 312e12, 108, "NVIDIA A100 40GB data sheet"),
    "cuda:sm_86": Roof(936e9, 35.6e12, 71e12, 82, "NVIDIA Ampere GA102 whitepaper, RTX 3090"),
    "cuda:sm_87": Roof(205e9, 5.3e12, 42e12, 16, "NVIDIA Jetson AGX Orin technical brief"),
    "cuda:sm_89": Roof(1008e9, 82.6e12, 165e12, 128, "NVIDIA Ada GPU architecture whitepaper, RTX 4090"),
    "cuda:sm_90": Roof(3350e9, 67e12, 989e12, 132, "NVIDIA H100 SXM data sheet"),
    "cuda:sm_100": Roof(8000e9, 80e12, 2250e12, 148, "NVIDIA B200 data sheet"),
    "cuda:sm_120": Roof(1792e9, 104.8e12, 209e12, 170, "NVIDIA Blackwell GB202 whitepaper, RTX 5090"),
    "metal": Roof(400e9, 13.6e12, 13.6e12, 38, "Apple, M2 Max, 38 cores"),
    "metal:ios": Roof(51e9, 2.1e12, 2.1e12, 6, "Apple A17 Pro, LPDDR5-6400 on 64 bits"),
    "android": Roof(77e9, 4.6e12, 0, 12, "Snapdragon 8 Gen 3 product brief, LPDDR5X-4800 on 64 bits"),
    "vulkan": Roof(256e9, 10e12, 0, 32, "AMD Radeon RX 6600 XT specifications"),
    "opencl": Roof(256e9, 10e12, 0, 32, "AMD Radeon RX 6600 XT specifications"),
    "cpu": Roof(20e9, 150e9, 0, 2, "two cores of a server CPU with AVX2 at 2.4 GHz, one DDR4-2666 channel"),
}


def nominal_roof(name: str) -> Roof:
    """Of a target by its name, the most specific row first: `cuda:sm_80+sm_90@HOST`, `cuda:sm_80`, `cuda`."""
    words = name.partition("@")[0].partition("+")[0]
    return _ROOFS.get(words) or _ROOFS.get(words.partition(":")[0]) or _ROOFS["opencl"]
