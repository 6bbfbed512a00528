"""The phone's end of adb's protocol, in front of a `helpers_phone.Phone`: the real client and server talk to it.

Written from AOSP's packages/modules/adb: protocol.txt (transport), SYNC.TXT (file transfer), shell_protocol.h.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from socketserver import StreamRequestHandler, TCPServer

from helpers_phone import Phone

_VERSION, _MAX_DATA = 0x01000001, 1 << 18
_STDOUT, _STDERR, _EXIT = 1, 2, 3
_BANNER = b"device::ro.product.name=dm1q;ro.product.model=SM_S911B;ro.product.device=dm1q;features=shell_v2,cmd"
_AUTH_TOKEN = 1


class Adbd(TCPServer):
    """Listens on a free port of this machine; `trusted` says whether the phone lets this computer in."""

    allow_reuse_address = True

    def __init__(self, phone: Phone, trusted: bool = True) -> None:
        self.phone, self.trusted = phone, trusted
        super().__init__(("127.0.0.1", 0), _Connection)
        phone.serial = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class _Connection(StreamRequestHandler):
    """One client; its streams one after the other."""

    def handle(self) -> None:
        """Until the connection ends, or is ended by `Phone.lose_after`."""
        assert isinstance(self.server, Adbd)
        self.phone = self.server.phone
        with suppress(EOFError, ConnectionError):
            while True:
                command, remote, _, data = self._receive()
                if command == b"CNXN" and self.server.trusted:
                    self._send(b"CNXN", _VERSION, _MAX_DATA, _BANNER)
                elif command in (b"CNXN", b"AUTH"):
                    self._send(b"AUTH", _AUTH_TOKEN, 0, bytes(20))
                elif command == b"OPEN":
                    self._open(remote, data.rstrip(b"\0").decode())

    def _open(self, remote: int, service: str) -> None:
        self.local, self.remote = remote + 1000, remote
        kind, _, argument = service.partition(":")
        words = kind.split(",")
        if words[0] == "shell":
            assert "v2" in words, service
            self._send(b"OKAY", self.local, self.remote)
            out, err, code = self.phone.shell(argument)
            packets = ((_STDOUT, out), (_STDERR, err), (_EXIT, bytes([code])))
            self._write(b"".join(struct.pack("<BI", kind, len(text)) + text for kind, text in packets if text))
        elif words[0] == "sync":
            self._send(b"OKAY", self.local, self.remote)
            self._sync(self._stream())
        else:
            self._send(b"CLSE", 0, self.remote)
            return
        self._send(b"CLSE", self.local, self.remote)

    def _sync(self, stream: Iterator[bytes]) -> None:
        """STAT, SEND, QUIT."""
        buffer = b""

        def take(count: int) -> bytes:
            nonlocal buffer
            while len(buffer) < count:
                buffer += next(stream)
            head, buffer = buffer[:count], buffer[count:]
            return head

        while True:
            name, length = struct.unpack("<4sI", take(8))
            if name == b"QUIT":
                return
            argument = take(length).decode()
            if name == b"STAT":
                mode = 0o40755 if self.phone.path(argument).is_dir() else 0
                self._write(struct.pack("<4sIII", b"STAT", mode, 0, 0))
                continue
            assert name == b"SEND", name
            data, room = b"", self.phone.lose_after
            while (block := struct.unpack("<4sI", take(8)))[0] == b"DATA":
                data += take(block[1])
                if len(data) > room:
                    self.phone.receive(argument.rpartition(",")[0], data)  # which ends the connection
            problem = self.phone.receive(argument.rpartition(",")[0], data)
            text = (problem or "").encode()
            self._write(struct.pack("<4sI", b"FAIL" if problem else b"OKAY", len(text)) + text)

    def _stream(self) -> Iterator[bytes]:
        """Data of the open stream, each part acknowledged."""
        while True:
            command, _, _, data = self._receive()
            if command == b"CLSE":
                raise EOFError
            if command == b"WRTE":
                self._send(b"OKAY", self.local, self.remote)
                yield data

    def _write(self, data: bytes) -> None:
        """Data to the client, which acknowledges each part."""
        for start in range(0, len(data), _MAX_DATA):
            self._send(b"WRTE", self.local, self.remote, data[start : start + _MAX_DATA])
            while (command := self._receive()[0]) != b"OKAY":
                if command == b"CLSE":
                    return

    def _receive(self) -> tuple[bytes, int, int, bytes]:
        head = self.rfile.read(24)
        if len(head) < 24:
            raise EOFError
        command, arg0, arg1, length, _, magic = struct.unpack("<4sIIIII", head)
        assert magic == int.from_bytes(command, "little") ^ 0xFFFFFFFF
        return command, arg0, arg1, self.rfile.read(length)

    def _send(self, command: bytes, arg0: int, arg1: int, data: bytes = b"") -> None:
        magic = int.from_bytes(command, "little") ^ 0xFFFFFFFF
        self.wfile.write(struct.pack("<4sIIIII", command, arg0, arg1, len(data), sum(data) & 0xFFFFFFFF, magic) + data)
