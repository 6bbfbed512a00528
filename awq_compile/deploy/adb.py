"""A thin client of `adb`: command lines, quoting for the device's shell, and its errors as ours.

`adb shell` joins its arguments with spaces and gives them to a shell on the phone, so every word is quoted here.
Error texts are those of Android's platform tools 29 to 35 (client/commandline.cpp, client/file_sync_client.cpp).
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from awq_compile import settings
from awq_compile.errors import EnvironmentMissingError, UsageError

RESUME: Final = "connect it again and type the same command: finished files are not sent again"
INSTALL: Final = "apt-get install adb, or Android's SDK Platform-Tools, so that adb is on PATH"

_TIMEOUT_S: Final = 600  # of a command that answers; hashing a model of some GB on a phone takes tens of seconds
_LOST: Final = (
    r"not found|offline|closed|EOF|no devices|connection reset|broken pipe|protocol fault|"
    r"failed to read|couldn't read from device|failed to get feature set|no response|transport|cannot connect to daemon"
)
_STATES: Final = {
    "offline": (
        "is offline: the phone does not answer",
        "unplug it, plug it in again and unlock it; else: adb kill-server",
    ),
    "unauthorized": (
        "does not trust this computer yet",
        "unlock the phone and accept the question about USB debugging; if none appears, revoke USB debugging "
        "authorisations in its developer options and plug it in again",
    ),
    "authorizing": ("is being authorised", "unlock the phone, accept the question about USB debugging, try again"),
    "connecting": ("is being connected", "try again in a moment"),
    "no permissions": (
        "may not be opened by this user",
        "apt-get install android-sdk-platform-tools-common, which has the udev rules; then plug the phone in again",
    ),
}


@dataclass(frozen=True)
class Listed:
    """A line of `adb devices`."""

    serial: str
    state: str


@dataclass(frozen=True)
class Adb:
    """One phone, or none yet (`serial` empty). With `dry_run`, commands that change the phone are told only."""

    serial: str = ""
    dry_run: bool = False
    tell: Callable[[str], None] = field(default=lambda _: None)

    def devices(self) -> list[Listed]:
        """What is connected, in whatever state."""
        return parse_devices(self._checked(["adb", "devices", "-l"]))

    def shell(self, *words: str) -> str:
        """Output of a command on the phone that changes nothing there; raises when it fails."""
        return self._checked(self._shell(words))

    def try_shell(self, *words: str) -> str:
        """The same, where failing is an answer; what went to stdout."""
        done = self._run(self._shell(words))
        if done.returncode == 255 or (done.returncode and re.search(r"^(adb|error): ", done.stderr, re.MULTILINE)):
            raise device_error(done.stderr)  # adb's own failure, not the command's
        return done.stdout

    def change(self, *commands: Sequence[str]) -> str:
        """Output of commands that change something on the phone, each only after the one before succeeded."""
        return self._change(self._shell(*commands))

    def push(self, local: str, remote: str) -> None:
        """Copies a file to the phone."""
        self._change(["adb", "-s", self.serial, "push", local, remote])

    def _shell(self, *commands: Sequence[str]) -> list[str]:
        return ["adb", "-s", self.serial, "shell", " && ".join(map(shlex.join, commands))]

    def _change(self, command: list[str]) -> str:
        if self.dry_run:
            self.tell(shlex.join(command))
            return ""
        return self._checked(command, timeout=None)

    def _checked(self, command: list[str], timeout: float | None = _TIMEOUT_S) -> str:
        done = self._run(command, timeout)
        if done.returncode:
            raise device_error(done.stderr or done.stdout)
        return done.stdout

    def _run(self, command: list[str], timeout: float | None = _TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        self.tell(shlex.join(command))
        try:
            return subprocess.run(
                command,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=timeout,
                env=settings.environment(),
            )
        except FileNotFoundError:
            raise EnvironmentMissingError("adb is not installed", hint=INSTALL) from None
        except OSError as error:
            raise EnvironmentMissingError(f"adb could not be started: {error}", hint=INSTALL) from None
        except subprocess.TimeoutExpired:
            raise EnvironmentMissingError(
                f"the phone did not answer within {timeout:.0f} s: {shlex.join(command)}", hint=RESUME
            ) from None


def parse_devices(text: str) -> list[Listed]:
    """Of the output of `adb devices`, with or without -l."""
    _, _, table = text.partition("List of devices attached")
    lines = (re.match(r"(\S+)\s+(no permissions|\S+)", line) for line in table.splitlines())
    return [Listed(line[1], line[2]) for line in lines if line]


def choose_device(devices: Sequence[Listed], serial: str | None) -> str:
    """Serial number of the phone that is meant, which must be ready."""
    listed = ", ".join(f"{device.serial} ({device.state})" for device in devices) or "none"
    if serial is not None:
        chosen = next((device for device in devices if device.serial == serial), None)
        if chosen is None:
            raise EnvironmentMissingError(
                f"no device {serial} is connected; connected are: {listed}", hint="adb devices lists what is"
            )
    elif not devices:
        raise EnvironmentMissingError(
            "no phone is connected",
            hint="turn on USB debugging in the phone's developer options and plug it in; adb devices then lists it",
        )
    elif len(devices) > 1:
        raise UsageError(
            f"{len(devices)} devices are connected: {listed}", hint=f"name one: --serial {devices[0].serial}"
        )
    else:
        chosen = devices[0]
    if chosen.state != "device":
        what, hint = _STATES.get(
            chosen.state, (f"is in the state {chosen.state!r}, not ready", "start Android on the phone")
        )
        raise EnvironmentMissingError(f"device {chosen.serial} {what}", hint=hint)
    return chosen.serial


def check_serial(serial: str) -> str:
    """A serial number, as USB and TCP devices have them."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]*", serial):
        raise UsageError(f"{serial!r} is not a serial number of a device", hint="adb devices lists them")
    return serial


def device_error(text: str) -> EnvironmentMissingError:
    """adb's words as an error of ours."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("* daemon")]
    if not lines:
        return EnvironmentMissingError("the connection to the phone was lost", hint=RESUME)
    # A failed push ends in a line about its speed.
    said = next((line for line in lines if line.startswith(("adb:", "error:"))), lines[-1])
    if re.search(r"no space left|not enough space", text, re.IGNORECASE):
        return EnvironmentMissingError(f"the phone's storage is full: {said}", hint="free some space there; " + RESUME)
    if re.search(r"unauthorized", text, re.IGNORECASE):
        what, hint = _STATES["unauthorized"]
        return EnvironmentMissingError(f"the phone {what}: {said}", hint=hint)
    if re.search(r"^(adb|error):.*(" + _LOST + ")", text, re.IGNORECASE | re.MULTILINE):
        return EnvironmentMissingError(f"the connection to the phone was lost: {said}", hint=RESUME)
    return EnvironmentMissingError(f"adb failed: {said}", hint="-v shows every command")
