"""`awq-compile deploy` through the real adb client and server, to a pretended phone that speaks adb's protocol."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_adbd import Adbd
from helpers_phone import FILES, MALI, Phone, write_dist

from awq_compile.cli.main import main

if shutil.which("adb") is None:
    pytest.skip("adb is not installed", allow_module_level=True)

MODEL = f"{FILES}/tiny-w4g32-android-adreno"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """An adb server of these tests' own, with keys of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("ADB_MDNS", "0")
        adb("start-server")
        yield patch
        adb("kill-server")


def adb(*words: str) -> str:
    """What the client says."""
    done = subprocess.run(["adb", *words], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.fixture
def phone(tmp_path: Path, server: pytest.MonkeyPatch) -> Iterator[Phone]:
    """Connected over TCP, as a phone in the same network is."""
    phone = Phone(tmp_path / "phone")
    with Adbd(phone) as daemon:
        assert "connected to" in adb("connect", phone.serial)
        adb("-s", phone.serial, "wait-for-device")
        yield phone
        adb("disconnect")
        daemon.shutdown()


def deploy(dist: Path, *words: str) -> int:
    """The verb's exit code."""
    return main(["deploy", str(dist), *words])


def test_deploy_and_resume(phone: Phone, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The connection ends in the middle of the second shard; connected again, the rest is sent, and all is whole."""
    dist = write_dist(tmp_path / "di st's")  # a local name that a shell would split
    phone.lose_after = 60_000
    assert deploy(dist) == 3
    err = capsys.readouterr().err
    assert "connection to the phone was lost" in err, err
    assert [path.name for path in phone.path(MODEL).iterdir()] == ["params_shard_0.bin"]
    phone.lose_after = 1 << 40
    adb("disconnect")
    adb("connect", phone.serial)
    adb("-s", phone.serial, "wait-for-device")
    assert deploy(dist, "--serial", phone.serial) == 0
    captured = capsys.readouterr()
    assert "5 files sent" in captured.out and "1 were there already" in captured.out
    for path in phone.path(MODEL).iterdir():
        assert path.read_bytes() == (dist / path.name).read_bytes()
    assert len(list(phone.path(MODEL).iterdir())) == 6 and not any(phone.path("/data/local/tmp").iterdir())
    assert deploy(dist) == 0 and "0 files sent" in capsys.readouterr().out


def test_a_full_phone(phone: Phone, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """adb's own words about it become ours."""
    phone.capacity = 50_000
    assert deploy(write_dist(tmp_path / "dist")) == 3
    err = capsys.readouterr().err
    assert "storage is full: adb: error: failed to copy" in err and "No space left on device" in err


def test_failures_on_the_phone(phone: Phone, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes of commands there come through: what is missing is told from what is broken."""
    dist = write_dist(tmp_path / "dist")
    phone.changed(gles=MALI)
    assert deploy(dist) == 2 and "the phone's GPU is mali" in capsys.readouterr().err
    phone.changed(packages=())
    assert deploy(dist) == 3 and "is not installed" in capsys.readouterr().err


def test_no_phone_and_an_untrusting_one(
    server: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client's list is understood."""
    dist = write_dist(tmp_path / "dist")
    assert deploy(dist) == 3 and "no phone is connected" in capsys.readouterr().err
    phone = Phone(tmp_path / "phone")
    with Adbd(phone, trusted=False) as daemon:
        adb("connect", phone.serial)
        assert deploy(dist) == 3 and "accept the question about USB debugging" in capsys.readouterr().err
        adb("disconnect")
        daemon.shutdown()
