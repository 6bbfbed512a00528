"""Devices behind TVM RPC servers: two under a tracker, of which one is killed, and the ways in which devices fail."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_tuning import COMMAND, CRASHES, FAILS, GOOD, HANGS, WORK, WRONG, FakeBuilds, fake

from awq_compile.errors import EnvironmentMissingError, UsageError
from awq_compile.targets import resolve_target
from awq_compile.tuning import rpc
from awq_compile.tuning.ahead import AheadMeasurer
from awq_compile.tuning.local import LocalMeasurer
from awq_compile.tuning.measure import SEARCH, Plan
from awq_compile.tuning.rpc import Place, RpcMeasurer, tracker_measurer
from awq_compile.tuning.space import space_of
from awq_compile.tuning.tracker import Address, Tracker

SPEC = resolve_target("cpu")
PLAN = Plan(warmups=1, most=3, cold_seconds=1e-5, warm_seconds=0)
KEY = "bench"


def free_port() -> int:
    """One that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Farm:
    """A tracker and two servers as processes of their own."""

    def __init__(self, folder: Path) -> None:
        (folder / "torch.py").write_text("raise ImportError('torch is slow to import')\n")
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "TVM_NUM_THREADS": "1"}
        self.address = Address("127.0.0.1", free_port())
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        self.tracker = self._start("rpc_tracker", self.address.port)
        self._wait(0)
        for _ in range(2):
            port = free_port()
            words = ("--tracker", str(self.address), "--key", KEY, "--custom-addr", "127.0.0.1")
            self.servers[f"127.0.0.1:{port}"] = self._start("rpc_server", port, *words)
        self._wait(2)

    def kill(self, server: str) -> None:
        """At once, with the session that it serves."""
        os.killpg(self.servers[server].pid, signal.SIGKILL)

    def close(self) -> None:
        for process in (self.tracker, *self.servers.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self, module: str, port: int, *words: str) -> subprocess.Popen[bytes]:
        ports = ("--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1), "--silent")
        command = [sys.executable, "-m", f"tvm.exec.{module}", *ports, *words]
        return subprocess.Popen(command, env=self.environment, start_new_session=True, stderr=subprocess.DEVNULL)

    def _wait(self, servers: int) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                if Tracker(self.address).devices().get(KEY, 0) == servers:
                    return
            except EnvironmentMissingError:
                pass
            time.sleep(0.1)
        raise AssertionError("the tracker and its servers do not start")


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    started = Farm(tmp_path)
    yield started
    started.close()


def test_a_run_outlives_one_of_its_servers(farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both devices measure, one is killed in the middle of it, and every candidate has its right result once."""
    work = replace(WORK, problem=replace(WORK.problem, dtype=SPEC.dtype))
    schedules = list(space_of(work.problem, work.bucket, SPEC).members)[:16]
    with pytest.raises(EnvironmentMissingError, match=r"no device with the key 'phone'; it has bench \(2\)"):
        tracker_measurer(SPEC, farm.address, "phone")
    with tracker_measurer(SPEC, farm.address, KEY) as measurer:
        assert measurer.capacity == 2
        assert (measurer.fingerprint().name, measurer.fingerprint().kind) == (KEY, "cpu")
        found, killed, before = [], "", 0
        for measurement in measurer.measure(work, schedules, SEARCH):
            found.append(measurement)
            if not killed and len(measurer.shares) == 2:
                killed = min(measurer.shares, key=lambda where: measurer.shares[where])
                before = measurer.shares[killed]
                farm.kill(killed)
        assert {m.schedule for m in found} == set(schedules) and len(found) == len(schedules)
        assert {m.status for m in found} == {"ok"}
        assert set(measurer.shares) == set(farm.servers) and sum(measurer.shares.values()) == len(schedules)
        assert before <= measurer.shares[killed] <= before + 1 and measurer.capacity == 1
        assert len(measurer.dropped) == 1 and "no free device" in measurer.dropped[0]
        compared = measurer.compare(work, schedules[:2], PLAN)
        assert [m.schedule for m in compared] == schedules[:2] and {m.status for m in compared} == {"ok"}
    # A library that was built elsewhere is not built here.
    (tmp_path / "built").mkdir()
    built = FakeBuilds(tmp_path / "built")
    monkeypatch.setattr(rpc, "RayBuilds", lambda address, spec: built)
    place = Place(farm.address, key=KEY, ray="auto")
    with place.open(SPEC, 0) as measurer:
        (found,) = measurer.measure(work, schedules[:1], PLAN)
        assert found.status == "failed" and "kernel1.so" in found.error
    assert built.closed and not list(built.folder.iterdir())


def fake_farm(count: int) -> RpcMeasurer:
    """Workers with a device that runs nothing."""
    return RpcMeasurer([LocalMeasurer(SPEC, command=COMMAND) for _ in range(count)])


def test_what_a_candidate_does_to_its_device() -> None:
    """One that crashes or hangs is tried twice, on restarted devices; the others are measured meanwhile."""
    behaviours = {fake(CRASHES): "crashed", fake(HANGS): "hung", fake(WRONG): "wrong", fake(FAILS): "failed"}
    good = [fake(GOOD, rows) for rows in (2, 4, 6)]
    plan = replace(PLAN, limit=2.0)
    with fake_farm(2) as measurer:
        found = {m.schedule: m.status for m in measurer.measure(WORK, [*behaviours, *good], plan)}
        assert found == behaviours | dict.fromkeys(good, "ok")
        assert sum(measurer.shares.values()) == 7 and not measurer.dropped


def test_candidates_that_are_built_elsewhere(tmp_path: Path) -> None:
    """What does not compile there never comes to a device; two candidates for each device are under way."""
    builds, bad, good = FakeBuilds(tmp_path), fake(FAILS), [fake(GOOD, rows) for rows in (2, 4, 6)]
    with RpcMeasurer([LocalMeasurer(SPEC, command=COMMAND) for _ in range(2)], builds) as measurer:
        assert measurer.capacity == 4
        found = {m.schedule: m for m in measurer.measure(WORK, [bad, *good], PLAN)}
        assert {s: m.status for s, m in found.items()} == {bad: "failed"} | dict.fromkeys(good, "ok")
        assert found[bad].error == "does not compile there" and found[bad].device == measurer.fingerprint()
        compared = measurer.compare(WORK, [good[0], bad, good[1]], PLAN)
        assert [(m.schedule, m.status) for m in compared] == [(good[0], "ok"), (bad, "failed"), (good[1], "ok")]
    assert builds.closed


def test_a_cluster_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    """It is not the devices' fault: none is dropped, and none waits for ever."""

    class Gone(FakeBuilds):
        def library(self, work: object, candidate: object) -> object:
            raise EnvironmentMissingError("the Ray cluster is gone")

    with RpcMeasurer([LocalMeasurer(SPEC, command=COMMAND) for _ in range(2)], Gone(tmp_path)) as measurer:
        with pytest.raises(EnvironmentMissingError, match="the Ray cluster is gone"):
            list(measurer.measure(WORK, [fake(GOOD, rows) for rows in (2, 4, 6)], PLAN))
        assert not measurer.dropped and measurer.capacity == 4


def test_when_no_device_is_left(tmp_path: Path) -> None:
    """What lost the last device has its result, and what was never begun is an error that names the reason."""
    once = tmp_path / "once"
    script = f"import pathlib, runpy, sys\npath = pathlib.Path({str(once)!r})\nif path.exists(): sys.exit(5)\n"
    script += f"path.touch()\nsys.argv = [{COMMAND[1]!r}]\nrunpy.run_path({COMMAND[1]!r}, run_name='__main__')\n"
    with RpcMeasurer([LocalMeasurer(SPEC, command=[sys.executable, "-c", script])]) as measurer:
        results = measurer.measure(WORK, [fake(CRASHES), fake(GOOD)], PLAN)
        assert next(results).status == "crashed"
        with pytest.raises(EnvironmentMissingError, match=r"no device is left .*exit status 5"):
            next(results)


def test_a_device_unlike_the_first_is_dropped() -> None:
    """Times of two kinds of devices are not mixed."""
    other = [
        sys.executable,
        "-c",
        "import helpers_tuning as h; "
        "from dataclasses import replace; "
        "h.FakeDevice.fingerprint = replace(h.FakeDevice.fingerprint, name='other'); "
        "from awq_compile.tuning.worker import serve; serve(lambda _: h.FakeDevice())",
    ]
    workers = [LocalMeasurer(SPEC, command=COMMAND), LocalMeasurer(SPEC, command=other)]
    with RpcMeasurer(workers) as measurer, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(COMMAND[1]).parent), os.environ.get("PYTHONPATH", "")]))
        measurer.fingerprint()
        found = list(measurer.measure(WORK, [fake(GOOD, 2), fake(GOOD, 4)], PLAN))
        assert {m.device.name for m in found if m.device} == {"fake"}
        assert len(measurer.dropped) == 1 and "another device: other" in measurer.dropped[0]


MAGIC = struct.pack("<i", 0x2F271)
ANSWERS = ["[", "[-1]", "[0, {}]", '[0, ["h", 70000, "k"]]', '[0, ["h/..", 7, "k"]]', '[0, ["h", 7, 1]]']


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400\r\n\r\n",
        MAGIC + b"\0\0\0\x40",
        *(MAGIC + struct.pack("<i", len(s)) + s.encode() for s in ANSWERS),
    ],
)
def test_what_is_no_tracker_is_named(answer: bytes) -> None:
    """Whatever answers at the address, the error is one line about it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = Address("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(EnvironmentMissingError, match=str(address)):
            Tracker(address).request("k")
        thread.join()


def test_no_tracker_and_no_place() -> None:
    """Nothing listens, and what was typed does not fit together."""
    with pytest.raises(EnvironmentMissingError, match="no RPC tracker answers"):
        Tracker(Address("127.0.0.1", free_port())).devices()
    for typed in (("h:1", "h:2", None), ("h:1", None, None), (None, None, "k"), ("h", None, "k"), ("h:1", None, "a b")):
        with pytest.raises(UsageError):
            Place.parse(*typed)
    assert Place.parse("h:1", None, "k") == Place(tracker=Address("h", 1), key="k")
    assert isinstance(Place().open(SPEC, 0), AheadMeasurer)
