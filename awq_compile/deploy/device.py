"""What must be known of an Android phone before a model is sent: ABI, GPU, OpenCL driver, app, free space."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from awq_compile.deploy.adb import Adb
from awq_compile.errors import EnvironmentMissingError

ABI: Final = "arm64-v8a"
STORAGE: Final = "/storage/emulated/0"
STAGE: Final = "/data/local/tmp"

# Where TVM's runtime looks for the driver: opencl_wrapper.cc. An app sees the first two by name only.
OPENCL: Final = (
    "/vendor/lib64/libOpenCL.so",
    "/vendor/lib64/libOpenCL-pixel.so",
    "/system/vendor/lib64/libOpenCL.so",
    "/system/lib64/libOpenCL.so",
    "/system/vendor/lib64/egl/libGLES_mali.so",
    "/system/vendor/lib64/libPVROCL.so",
)
PUBLIC_LIBRARIES: Final = "/vendor/etc/public.libraries.txt"


@dataclass(frozen=True)
class Phone:
    """Facts; `gpu` is `adreno`, `mali` or `other`, `renderer` its own words, `opencl` the driver's path or empty."""

    serial: str
    model: str
    abis: tuple[str, ...]
    gpu: str
    renderer: str
    platform: str
    opencl: str
    opencl_public: bool
    app_installed: bool


def read_phone(adb: Adb, app: str) -> Phone:
    """Asks the phone; changes nothing."""
    properties = parse_properties(adb.shell("getprop"))
    egl, platform = properties.get("ro.hardware.egl", ""), properties.get("ro.board.platform", "")
    renderer = gles_renderer(adb.try_shell("dumpsys", "SurfaceFlinger"))
    drivers = adb.try_shell("ls", "-d", *OPENCL).split()
    driver = next((path for path in OPENCL if path in drivers), "")
    public = adb.try_shell("cat", PUBLIC_LIBRARIES)
    return Phone(
        serial=adb.serial,
        model=properties.get("ro.product.model", "phone"),
        abis=tuple(filter(None, properties.get("ro.product.cpu.abilist", "").split(","))),
        gpu=gpu_family(renderer, egl, platform),
        renderer=renderer or egl,
        platform=platform,
        opencl=driver,
        opencl_public=PurePosixPath(driver).name in public.split(),
        app_installed="package:" in adb.try_shell("pm", "path", app),
    )


def check_phone(phone: Phone, app: str) -> None:
    """Raises for the first thing without which no model runs."""
    if ABI not in phone.abis:
        raise EnvironmentMissingError(
            f"{phone.model} ({phone.serial}) runs {', '.join(phone.abis) or 'an unknown ABI'}; the library is {ABI}",
            hint="use a phone with a 64-bit Arm system",
        )
    if not phone.opencl:
        raise EnvironmentMissingError(
            f"{phone.model} ({phone.serial}) has no OpenCL driver: none of {', '.join(OPENCL)}",
            hint="use a phone whose maker ships one; most with Adreno or Mali do",
        )
    if not phone.app_installed:
        raise EnvironmentMissingError(
            f"the app {app} is not installed on {phone.model} ({phone.serial})",
            hint="adb install APK (docs/android.md says how to build it), or name another with --app",
        )


def free_bytes(adb: Adb, folder: str) -> int:
    """Free space of the file system that holds a folder of the phone."""
    text = adb.shell("df", "-kP", folder)
    fields = text.splitlines()[-1].split() if text.strip() else []
    if len(fields) < 4 or not fields[3].isdigit():
        raise EnvironmentMissingError(f"df on the phone says {text[-200:]!r}, which is not understood")
    return int(fields[3]) * 1024


def parse_properties(text: str) -> dict[str, str]:
    """Of the output of getprop: `[ro.product.model]: [Pixel 8]`."""
    return dict(re.findall(r"^\[(.+?)\]: \[(.*)\]$", text.replace("\r", ""), re.MULTILINE))


def gles_renderer(dump: str) -> str:
    """Vendor and renderer from `dumpsys SurfaceFlinger`: `Qualcomm, Adreno (TM) 740`; empty without one."""
    found = re.search(r"^\s*GLES: (.+)$", dump, re.MULTILINE)
    return re.sub(r",\s*OpenGL ES.*", "", found[1]).strip() if found else ""


def gpu_family(renderer: str, egl: str, platform: str) -> str:
    """The renderer decides; else the name of the EGL driver; else Qualcomm's part numbers."""
    for text in (renderer, egl):
        for family in ("adreno", "mali"):
            if family in text.lower():
                return family
        if text == renderer and text:
            return "other"
    return "adreno" if re.match(r"(sm|sdm|msm)\d", platform) else "other"
