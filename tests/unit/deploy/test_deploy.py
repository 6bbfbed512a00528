"""`awq-compile deploy` against a stand-in for adb and a pretended phone with a real shell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_phone import FILES, MALI, SERIAL, AdbServer, Phone, write_dist

from awq_compile.cli.main import main
from awq_compile.deploy.adb import Adb
from awq_compile.errors import EnvironmentMissingError

MODEL = f"{FILES}/tiny-w4g32-android-adreno"
Deploy = Callable[..., tuple[int, str, str]]


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdbServer]:
    """A stand-in `adb` on PATH, with no phone connected."""
    folder = tmp_path / "adb"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_ADB", str(folder / "socket"))
    with AdbServer(folder, []) as server:
        yield server
        server.shutdown()


@pytest.fixture
def phone(tmp_path: Path, adb: AdbServer) -> Phone:
    """A Samsung with an Adreno, connected."""
    adb.phones.append(Phone(tmp_path / "phone"))
    return adb.phones[0]


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    """For an Adreno."""
    return write_dist(tmp_path / "dist")


@pytest.fixture
def deploy(capsys: pytest.CaptureFixture[str]) -> Deploy:
    """Runs the verb → (exit code, stdout, stderr)."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = main(["deploy", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def holds(phone: Phone, dist: Path, folder: str = MODEL) -> bool:
    """Whether the model's folder holds exactly the model's files, and nothing is left elsewhere."""
    want = [*(f"params_shard_{i}.bin" for i in range(3)), "mlc-chat-config.json", "tensor-cache.json", "tokenizer.json"]
    there = {path.name: path.read_bytes() for path in phone.path(folder).iterdir()}
    return there == {name: (dist / name).read_bytes() for name in want} and not any(
        phone.path("/data/local/tmp").iterdir()
    )


def test_a_model_goes_to_the_phone(phone: Phone, dist: Path, deploy: Deploy, adb: AdbServer) -> None:
    """All files, whole, under the id that the app's configuration has; a second time nothing; then what changed."""
    code, out, err = deploy(dist)
    assert code == 0, err
    assert "SM-S911B" in err and "Adreno (TM) 740" in err and "6 files sent" in out
    assert holds(phone, dist)
    assert len(adb.pushed()) == 6
    ids = [entry["model_id"] for entry in json.loads((dist / "mlc-app-config.json").read_text())["model_list"]]
    assert [path.name for path in phone.path(FILES).iterdir()] == ids

    code, out, _ = deploy(dist, "--json")
    assert code == 0 and json.loads(out)["sent"] == [] and adb.pushed() == []

    phone.path(f"{MODEL}/params_shard_7.bin").write_text("of a larger version")
    phone.path(f"{MODEL}/notes.txt").write_text("of the user")
    write_dist(dist, data=b"changed")
    code, out, err = deploy(dist, "--serial", SERIAL)
    assert code == 0 and "1 files sent" in out and "1 of another version removed" in out, err
    assert adb.pushed() == ["params_shard_1.bin"]
    phone.path(f"{MODEL}/notes.txt").unlink()
    assert holds(phone, dist)


def test_a_dry_run_changes_nothing(phone: Phone, dist: Path, deploy: Deploy, adb: AdbServer, tmp_path: Path) -> None:
    """It prints exactly the commands that the real run then gives, and runs none that changes the phone."""
    before = sorted(phone.path("/").rglob("*"))
    code, out, err = deploy(dist, "--dry-run")
    assert code == 0, err
    assert sorted(phone.path("/").rglob("*")) == before and adb.pushed() == []
    code, real, _ = deploy(dist, "--json")
    assert code == 0 and out.splitlines() == json.loads(real)["commands"]
    assert holds(phone, dist)


def test_a_dry_run_without_a_phone(adb: AdbServer, dist: Path, deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what a phone that has nothing would get, also where adb is not installed."""
    code, out, err = deploy(dist, "--dry-run")
    assert code == 0 and "no phone is connected" in err
    assert sum(line.startswith("adb -s SERIAL push") for line in out.splitlines()) == 6
    monkeypatch.setenv("PATH", "/nowhere")
    assert deploy(dist, "--dry-run")[1] == out


def test_an_interrupted_push_is_resumed(phone: Phone, dist: Path, deploy: Deploy, adb: AdbServer) -> None:
    """The connection ends in the middle of the second shard: nothing half is under a final name, the app does not
    see a model, and the next run sends the rest only."""
    phone.changed(lose_after=60_000)
    code, _, err = deploy(dist)
    assert code == 3 and "connection to the phone was lost" in err and "same command" in err
    assert adb.pushed() == ["params_shard_0.bin", "params_shard_1.bin"]
    assert [path.name for path in phone.path(MODEL).iterdir()] == ["params_shard_0.bin"]
    phone.changed(lose_after=1 << 40)  # connected again
    code, _, err = deploy(dist)
    assert code == 0, err
    assert adb.pushed()[:2] == ["params_shard_1.bin", "params_shard_2.bin"]
    assert holds(phone, dist)


def test_an_interrupted_update_is_no_mixture(phone: Phone, dist: Path, deploy: Deploy, adb: AdbServer) -> None:
    """While shards of two versions lie there, the configuration does not, so the app does not load them."""
    assert deploy(dist)[0] == 0
    write_dist(dist, data=b"changed")
    phone.changed(lose_after=10_000)
    assert deploy(dist)[0] == 3
    assert not phone.path(f"{MODEL}/mlc-chat-config.json").exists()
    phone.changed(lose_after=1 << 40)
    assert deploy(dist)[0] == 0
    assert holds(phone, dist)


def test_storage_that_is_full(phone: Phone, dist: Path, deploy: Deploy, adb: AdbServer) -> None:
    """Seen before anything is sent; and where df was too hopeful, the phone's own error, with the rest cleaned up."""
    phone.changed(free_kb=100)
    code, _, err = deploy(dist)
    assert code == 3 and "MB are needed in the app's storage" in err and adb.pushed() == []
    phone.changed(free_kb=8_000_000, capacity=50_000)
    code, _, err = deploy(dist)
    assert code == 3 and "storage is full" in err and "No space left on device" in err
    assert not any(phone.path("/data/local/tmp").iterdir())


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"state": "offline"}, 3, "is offline"),
        ({"state": "unauthorized"}, 3, "accept the question about USB debugging"),
        ({"properties": {"ro.product.model": "Old", "ro.product.cpu.abilist": "armeabi-v7a"}}, 3, "runs armeabi-v7a"),
        ({"gles": MALI}, 2, "the phone's GPU is mali, and"),
        ({"packages": ("ai.mlc.mlcchat2",)}, 3, "the app ai.mlc.mlcchat is not installed"),
        ({"driver": ""}, 3, "has no OpenCL driver"),
    ],
)
def test_a_phone_that_will_not_do(
    phone: Phone, dist: Path, deploy: Deploy, adb: AdbServer, changed: dict[str, object], code: int, words: str
) -> None:
    """One clear error each, and nothing is sent."""
    if "driver" in changed:
        phone.path("/vendor/lib64/libOpenCL.so").unlink()
    phone.changed(**changed)
    got, _, err = deploy(dist)
    assert got == code and words in err and "hint:" in err
    assert adb.pushed() == []


def test_mali_gets_its_own_library(phone: Phone, tmp_path: Path, deploy: Deploy) -> None:
    """Of a DIST for both, under that library's id; --target overrules."""
    phone.changed(gles=MALI)
    both = write_dist(tmp_path / "both", ("android:adreno", "android:mali"))
    assert json.loads(deploy(both, "--dry-run", "--json")[1])["folder"] == f"{FILES}/tiny-w4g32-android-mali"
    assert json.loads(deploy(both, "--dry-run", "--json", "--target", "android")[1])["folder"] == MODEL


def test_no_phone_several_phones_no_adb(
    phone: Phone, adb: AdbServer, dist: Path, deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit codes 3, 2 and 3, each with what to type."""
    adb.phones.append(Phone(tmp_path / "second", serial="OTHER"))
    code, _, err = deploy(dist)
    assert code == 2 and "2 devices are connected" in err and f"--serial {SERIAL}" in err
    assert "adb -s OTHER push" in deploy(dist, "--serial", "OTHER", "--dry-run")[1]
    adb.phones.clear()
    code, _, err = deploy(dist)
    assert code == 3 and "no phone is connected" in err
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = deploy(dist)
    assert code == 3 and "adb is not installed" in err and "apt-get install adb" in err


def test_iphone(adb: AdbServer, tmp_path: Path, deploy: Deploy) -> None:
    """There adb has no part: the error says which command and document come next."""
    code, _, err = deploy(write_dist(tmp_path / "ios", ("metal:ios",)))
    assert code == 2 and "Xcode" in err and "awq-compile package" in err and "docs/ios.md" in err
    assert adb.log == []


def test_a_damaged_file_is_not_sent(phone: Phone, dist: Path, deploy: Deploy, adb: AdbServer) -> None:
    """A shard that is not what the manifest says."""
    shard = dist / "params_shard_1.bin"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    code, _, err = deploy(dist)
    assert code == 1 and "params_shard_1.bin: sha256 is" in err and adb.pushed() == []


def test_a_file_that_arrives_damaged(phone: Phone, dist: Path, deploy: Deploy) -> None:
    """It is taken away again, and the error says both digests."""
    phone.changed(flips_bits=True)
    code, _, err = deploy(dist)
    assert code == 3 and "params_shard_0.bin arrived with sha256" in err
    assert not any(phone.path(MODEL).iterdir())


def test_words_reach_the_phone_as_they_are(phone: Phone) -> None:
    """Its shell sees quoted words: nothing in a name is run there; and after a failure it does not go on."""
    name = "/data/local/tmp/a b';$(touch pwned) & \\"
    Adb(SERIAL).change(["mkdir", name], ["touch", f"{name}/x"])
    assert [path.name for path in phone.path(name).iterdir()] == ["x"]
    assert not phone.path("/pwned").exists()
    with pytest.raises(EnvironmentMissingError, match="No such file"):
        Adb(SERIAL).change(["ls", "/data/absent"], ["touch", "/data/after"])
    assert not phone.path("/data/after").exists()


def test_the_apps_own_list_of_models(phone: Phone, dist: Path, deploy: Deploy) -> None:
    """MLCChat prefers a list that it wrote itself; one without the model is pointed out."""
    phone.path(FILES).mkdir(parents=True)
    phone.path(f"{FILES}/mlc-app-config.json").write_text('{"model_list": []}')
    code, _, err = deploy(dist, "--dry-run")
    assert code == 0 and "note: the app keeps a list of models of its own" in err
    phone.path(f"{FILES}/mlc-app-config.json").write_text('{"model_id":"tiny-w4g32-android-adreno"}')
    assert "note:" not in deploy(dist, "--dry-run")[2]
