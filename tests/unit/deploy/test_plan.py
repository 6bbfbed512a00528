"""What is sent, to which phone, and what adb's words mean: pure functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_phone import write_dist

from awq_compile.deploy.adb import Listed, check_serial, choose_device, device_error, parse_devices
from awq_compile.deploy.device import gles_renderer, gpu_family, parse_properties
from awq_compile.deploy.plan import (
    ModelFile,
    app_folder,
    check_space,
    choose_library,
    make_plan,
    model_files,
    model_folder,
)
from awq_compile.errors import ArtifactError, EnvironmentMissingError, UsageError
from awq_compile.manifest import open_dist


def file(name: str, nbytes: int = 1, sha256: str = "a") -> ModelFile:
    """One of the model's."""
    return ModelFile(Path("/x") / name, nbytes, sha256)


def test_only_what_differs_is_sent() -> None:
    """Missing and different files in the given order; other shards go, other files stay."""
    files = [file("params_shard_0.bin", 5), file("params_shard_1.bin", 7), file("tokenizer.json", 2)]
    there = {"params_shard_0.bin": "a", "params_shard_1.bin": "b", "params_shard_2.bin": "a", "notes.txt": "a"}
    plan = make_plan(files, there)
    assert [f.name for f in plan.send] == ["params_shard_1.bin", "tokenizer.json"]
    assert [f.name for f in plan.keep] == ["params_shard_0.bin"]
    assert plan.remove == ("params_shard_2.bin",)
    assert (plan.nbytes, plan.largest) == (9, 7)
    check_space(plan, 16, 7)
    with pytest.raises(EnvironmentMissingError, match="app's storage"):
        check_space(plan, 15, 7)
    with pytest.raises(EnvironmentMissingError, match="staging folder"):
        check_space(plan, 16, 6)
    check_space(make_plan(files[:1], there), 0, 0)


def test_the_library_fits_the_gpu(tmp_path: Path) -> None:
    """By GPU, else the generic one, else refused; --target decides; no library for apps says which to build."""
    dist = open_dist(write_dist(tmp_path / "d", ("cpu", "android:adreno", "android:mali", "android:so")))
    assert choose_library(dist, "adreno", None) == "android:adreno"
    assert choose_library(dist, "mali", None) == "android:mali"
    assert choose_library(dist, "mali", "android") == "android:adreno"
    assert choose_library(dist, None, None) == "android:adreno"
    assert model_folder(dist, "android:mali", "a.b").endswith("/Android/data/a.b/files/tiny-w4g32-android-mali")
    with pytest.raises(UsageError, match="the phone's GPU is other"):
        choose_library(dist, "other", None)
    with pytest.raises(UsageError, match="has no library for android:so"):  # a shared library is not the app's
        choose_library(dist, "adreno", "android:so")
    generic = open_dist(write_dist(tmp_path / "g", ("android:generic",)))
    assert choose_library(generic, "other", None) == choose_library(generic, "mali", None) == "android:generic"
    with pytest.raises(UsageError, match="no library that MLC's Android app links"):
        choose_library(open_dist(write_dist(tmp_path / "c", ("cpu", "android:so"))), "adreno", None)


def test_the_files_of_a_model(tmp_path: Path) -> None:
    """Shards first, the configuration last; no library, report or package configuration."""
    names = [f.name for f in model_files(open_dist(write_dist(tmp_path / "d")))]
    shards = [f"params_shard_{i}.bin" for i in range(3)]
    assert names == [*shards, "tokenizer.json", "tensor-cache.json", "mlc-chat-config.json"]


@pytest.mark.parametrize("name", ["a b", "-rf", "$(touch x)", "a;b", "sub/x", "..", ".hidden", "a'b", "ü", 3])
def test_hostile_names_do_not_reach_the_phone(tmp_path: Path, name: object) -> None:
    """A manifest's and a configuration's names are plain file names, or the DIST is refused."""
    folder = write_dist(tmp_path / "d")
    if isinstance(name, str) and name not in ("..", "sub/x"):
        (folder / name).write_text("")
    config = json.loads((folder / "mlc-chat-config.json").read_text()) | {"tokenizer_files": [name]}
    text = json.dumps(config)
    (folder / "mlc-chat-config.json").write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["mlc-chat-config.json"]["nbytes"] = len(text.encode())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="not a plain file name"):
        model_files(open_dist(folder))


def test_app_and_serial_are_checked() -> None:
    """Neither brings a path, an option or a shell's character."""
    assert app_folder("ai.mlc.mlcchat") == "/storage/emulated/0/Android/data/ai.mlc.mlcchat/files"
    for app in ("mlcchat", "a/b.c", "../a.b", "a.b;c", "a.b ", "ä.b"):
        with pytest.raises(UsageError, match="not the name of an Android package"):
            app_folder(app)
    assert check_serial("127.0.0.1:5555") == "127.0.0.1:5555"
    for serial in ("-d", "a b", "$(x)", "a/b", ""):
        with pytest.raises(UsageError, match="not a serial number"):
            check_serial(serial)


DEVICES = """* daemon started successfully
List of devices attached
R5CW1234ABC            device usb:1-2 product:dm1q model:SM_S911B device:dm1q transport_id:3
0123456789             no permissions (user in plugdev group; are your udev rules wrong?); see [http://x] usb:1-1
emulator-5554          offline transport_id:1
192.168.1.7:5555       unauthorized transport_id:2

"""


def test_the_list_of_devices() -> None:
    """Serial numbers and states, with what adb says around them."""
    listed = parse_devices(DEVICES)
    assert [d.state for d in listed] == ["device", "no permissions", "offline", "unauthorized"]
    assert choose_device(listed, "R5CW1234ABC") == choose_device(listed[:1], None) == "R5CW1234ABC"
    assert parse_devices("List of devices attached\n\n") == parse_devices("") == []


@pytest.mark.parametrize(
    ("devices", "serial", "words"),
    [
        ([], None, "no phone is connected"),
        (["device", "device"], None, "2 devices are connected"),
        (["device"], "nope", "no device nope is connected; connected are: s0"),
        (["offline"], None, "is offline"),
        (["unauthorized"], None, "does not trust this computer"),
        (["no permissions"], None, "may not be opened by this user"),
        (["recovery"], None, "state 'recovery'"),
        (["device", "offline"], "s1", "device s1 is offline"),
    ],
)
def test_a_device_that_will_not_do(devices: list[str], serial: str | None, words: str) -> None:
    """One clear error each, with what to do."""
    with pytest.raises((EnvironmentMissingError, UsageError), match=words) as error:
        choose_device([Listed(f"s{i}", state) for i, state in enumerate(devices)], serial)
    assert error.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("error: device 'R5' not found", "connection to the phone was lost"),
        ("adb: error: failed to copy 'a' to 'b': couldn't read from device", "connection"),
        ("", "connection to the phone was lost"),
        ("adb: error: failed to copy 'a' to 'b': remote write failed: No space left on device", "storage is full"),
        ("mv: write b: No space left on device", "storage is full"),
        ("error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set", "does not trust"),
        ("adb: error: failed to copy 'a' to 'b': remote couldn't create file: Permission denied", "Permission denied"),
        ("/system/bin/sh: sha256sum: not found", "adb failed: .*sha256sum"),
    ],
)
def test_errors_of_adb(text: str, words: str) -> None:
    """Each becomes an error of ours that says what to do."""
    error = device_error(text)
    assert error.hint
    with pytest.raises(EnvironmentMissingError, match=words):
        raise error


@pytest.mark.parametrize(
    ("gles", "egl", "platform", "family"),
    [
        ("GLES: Qualcomm, Adreno (TM) 740, OpenGL ES 3.2 V@0676.53", "adreno", "kalama", "adreno"),
        ("  GLES: ARM, Mali-G715, OpenGL ES 3.2 v1.r44p1", "mali", "zuma", "mali"),
        ("GLES: ANGLE (ARM, Vulkan 1.3.278 (Mali-G715 MC10)), OpenGL ES 3.1", "", "", "mali"),
        ("GLES: Samsung Electronics, ANGLE (Samsung Xclipse 920)", "angle", "exynos2200", "other"),
        ("nothing", "mali", "gs101", "mali"),
        ("nothing", "meow", "sm8550", "adreno"),
        ("nothing", "meow", "mt6893", "other"),
    ],
)
def test_the_gpu(gles: str, egl: str, platform: str, family: str) -> None:
    """The renderer decides, then the driver's name, then Qualcomm's part numbers."""
    assert gpu_family(gles_renderer(f"x\n{gles}\ny"), egl, platform) == family


def test_properties() -> None:
    """Also with the line ends of old phones, and with brackets inside."""
    assert parse_properties("[a.b]: [c]\r\n[d]: [[e] f]\n[empty]: []\n") == {"a.b": "c", "d": "[e] f", "empty": ""}
