"""A pretended Android phone: files under a folder of this machine, and a shell that finds them under absolute names.

`Phone.shell` really runs `sh`, so quoting that fails is seen to fail. Only the words of a phone that awq-compile
needs are there. `write_dist` makes a DIST for it without a compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import StreamRequestHandler, UnixStreamServer
from typing import Any

# The tools get phone's paths and the shell's folder; /bin is the machine's own.
_TOOLS = {
    "getprop": 'cat "$PHONE/getprop"',
    "dumpsys": 'cat "$PHONE/dumpsys"',
    "pm": '[ "$1" = path ] && grep -qxF -- "$2" "$PHONE/packages" && echo "package:/data/app/$2/base.apk"',
    "df": """echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'
             echo "/dev/fuse 1000000 1 $(cat "$PHONE/free_kb") 1% $2" """,
}
_FILE_TOOLS = ("ls", "cat", "sha256sum", "mkdir", "mv", "rm", "touch")
# Paths in, paths out: what a tool says of the folder it says of the phone's root.
_FILE_TOOL = """for word; do shift; case $word in /*) word=$PHONE/root$word;; esac; set -- "$@" "$word"; done
out=$({tool} "$@" 2>"$PHONE/stderr"); code=$?
[ -z "$out" ] || printf '%s\\n' "$out" | sed "s|$PHONE/root||"
[ ! -s "$PHONE/stderr" ] || sed "s|$PHONE/root||" "$PHONE/stderr" >&2
exit $code"""

SERIAL = "R5CW1234ABC"
APP = "ai.mlc.mlcchat"
FILES = f"/storage/emulated/0/Android/data/{APP}/files"
SAMSUNG = {
    "ro.product.model": "SM-S911B",
    "ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a,armeabi",
    "ro.hardware.egl": "adreno",
    "ro.board.platform": "kalama",
}
ADRENO = "GLES: Qualcomm, Adreno (TM) 740, OpenGL ES 3.2 V@0676.53"
MALI = "GLES: ARM, Mali-G715, OpenGL ES 3.2 v1.r44p1"


@dataclass
class Phone:
    """A phone in a folder. `lose_after` ends the connection when so many bytes have been pushed."""

    folder: Path
    serial: str = SERIAL
    state: str = "device"
    properties: dict[str, str] = field(default_factory=lambda: dict(SAMSUNG))
    gles: str = ADRENO
    packages: tuple[str, ...] = (APP,)
    free_kb: int = 8_000_000
    capacity: int = 1 << 40
    lose_after: int = 1 << 40
    driver: str = "/vendor/lib64/libOpenCL.so"
    flips_bits: bool = False

    def __post_init__(self) -> None:
        tools = self.folder / "bin"
        tools.mkdir(parents=True, exist_ok=True)
        scripts = _TOOLS | {tool: _FILE_TOOL.replace("{tool}", f"/bin/{tool}") for tool in _FILE_TOOLS}
        for name, body in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{body}\n")
            (tools / name).chmod(0o755)
        for path, text in ((self.driver, "ELF"), ("/vendor/etc/public.libraries.txt", f"{Path(self.driver).name}\n")):
            self.path(path).parent.mkdir(parents=True, exist_ok=True)
            self.path(path).write_text(text)
        for folder in ("/data/local/tmp", "/storage/emulated/0/Android/data"):
            self.path(folder).mkdir(parents=True, exist_ok=True)
        self.changed()

    def changed(self, **values: Any) -> None:
        """Sets attributes; the phone's tools learn of them."""
        self.__dict__ |= values
        write = {
            "getprop": "".join(f"[{key}]: [{value}]\n" for key, value in self.properties.items()),
            "dumpsys": f"Build configuration:\nDisplay 0\n{self.gles}\n   extensions\n",
            "packages": "\n".join(self.packages),
            "free_kb": str(self.free_kb),
        }
        for name, text in write.items():
            (self.folder / name).write_text(text)

    def path(self, name: str) -> Path:
        """Where a file of the phone lies here."""
        return self.folder / "root" / name.lstrip("/")

    def shell(self, command: str) -> tuple[bytes, bytes, int]:
        """stdout, stderr and exit code of a command line on the phone."""
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            capture_output=True,
            cwd=self.folder / "root",
            env={"PATH": str(self.folder / "bin"), "PHONE": str(self.folder)},
        )
        return done.stdout, done.stderr, done.returncode

    def room(self) -> int:
        """Bytes that still fit."""
        return self.capacity - sum(p.stat().st_size for p in self.path("/").rglob("*") if p.is_file())

    def receive(self, name: str, data: bytes) -> str | None:
        """A pushed file, as far as it fits and the connection lasts → what the phone says, None when all is well."""
        kept = data[: max(0, min(self.room(), self.lose_after))]
        if self.flips_bits:
            kept = bytes([kept[0] ^ 1]) + kept[1:]
        lost = self.lose_after < len(data)
        self.lose_after = 0 if lost else self.lose_after - len(data)
        try:
            self.path(name).write_bytes(kept)
        except OSError as error:
            return f"couldn't create file: {os.strerror(error.errno or 0)}"
        if lost:
            raise ConnectionAbortedError
        return None if len(kept) == len(data) else "write failed: No space left on device"


class AdbServer(UnixStreamServer):
    """Answers `fake_adb.py`, with the texts of adb 29; `folder/adb` is that program. `log` gets the command lines."""

    def __init__(self, folder: Path, phones: list[Phone]) -> None:
        self.phones, self.log = phones, list[list[str]]()
        super().__init__(str(folder / "socket"), _Handler)
        (folder / "adb").write_text(
            f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).parent}/fake_adb.py "$@"\n'
        )
        (folder / "adb").chmod(0o755)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def pushed(self) -> list[str]:
        """Names of the files that were pushed since the last call."""
        names = [Path(words[3]).name for words in self.log if words[2:3] == ["push"]]
        self.log.clear()
        return names

    def answer(self, words: list[str]) -> tuple[int, bytes, bytes]:
        """Exit code, stdout and stderr of `adb WORDS`."""
        if words == ["devices", "-l"]:
            lines = (f"{p.serial:<22} {p.state} usb:1-2 product:dm1q model:SM_S911B\n" for p in self.phones)
            return 0, f"List of devices attached\n{''.join(lines)}\n".encode(), b""
        option, serial, verb, *rest = words
        assert option == "-s" and verb in ("shell", "push")
        before = "adb: error: failed to get feature set" if verb == "push" else "error"
        phone = next((p for p in self.phones if p.serial == serial), None)
        if phone is None or phone.lose_after <= 0:
            return 1, b"", f"{before}: device '{serial}' not found\n".encode()
        if phone.state != "device":
            return 1, b"", f"{before}: device {phone.state}\n".encode()
        if verb == "shell":
            out, err, code = phone.shell(" ".join(rest))
            return code, out, err
        local, remote = rest
        try:
            problem = phone.receive(remote, Path(local).read_bytes())
        except ConnectionAbortedError:
            problem = "lost"
        if problem is None:
            return 0, f"{local}: 1 file pushed, 0 skipped. 33.8 MB/s (40000 bytes in 0.001s)\n".encode(), b""
        said = "couldn't read from device" if problem == "lost" else f"remote {problem}"
        text = f"adb: error: failed to copy '{local}' to '{remote}': {said}\n{local}: 0 files pushed, 0 skipped.\n"
        return 1, text.encode(), b""


class _Handler(StreamRequestHandler):
    def handle(self) -> None:
        """One command line."""
        assert isinstance(self.server, AdbServer)
        words = self.rfile.readline().decode().rstrip("\n").split("\x1f")
        self.server.log.append(words)
        code, out, err = self.server.answer(words)
        self.wfile.write(b"\0".join((str(code).encode(), out, err)))


def write_dist(
    folder: Path, targets: tuple[str, ...] = ("android:adreno",), model: str = "tiny", data: bytes = b""
) -> Path:
    """A DIST of three shards of 40,000 bytes; `data` goes into the second."""
    from awq_compile.artifact import DistWriter
    from awq_compile.deploy.package import package_files
    from awq_compile.formats import QuantScheme
    from awq_compile.manifest import dump_json

    scheme = QuantScheme.parse("w4g32")
    chat = {
        "tokenizer_files": ["tokenizer.json"],
        "context_window_size": 1024,
        "prefill_chunk_size": 128,
        "model_config": {
            "vocab_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "head_dim": 64,
        },
    }
    with DistWriter(folder) as dist:
        records = []
        for i in range(3):
            array = (data if i == 1 else b"").ljust(40_000, b"%d" % i)
            name = f"params_shard_{i}.bin"
            (dist.path / name).write_bytes(array)
            record = {"name": f"p{i}", "shape": [40_000], "dtype": "uint8", "format": "raw", "nbytes": 40_000}
            records.append({"dataPath": name, "nbytes": 40_000, "records": [record | {"byteOffset": 0}]})
        dist.write_text("tensor-cache.json", dump_json({"records": records}))
        dist.write_text("tokenizer.json", "{}")
        dist.write_text("mlc-chat-config.json", dump_json(chat))
        for target in targets:
            suffix = ".so" if target in ("cpu", "metal", "android:so") else ".tar"
            dist.library_path(model, scheme, target, suffix, {}).write_bytes(target.encode())
        usage = {target: {"decode": 1000} for target in targets}
        for name, text in package_files(dist.libraries, chat, 120_000, usage).items():
            dist.write_text(name, text)
        dist.manifest(model, scheme, {})
        dist.commit()
    return folder
