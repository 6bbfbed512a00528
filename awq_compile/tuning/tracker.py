"""The two questions we have for a TVM RPC tracker: what devices are there, and may we have one.

TVM's own client waits a minute for a tracker that is not there, and without end for an answer. The protocol is that of
`tvm/rpc/tracker.py`: a magic number each way, then messages of a little-endian length and JSON.
"""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from awq_compile.errors import EnvironmentMissingError, UsageError

_MAGIC: Final = 0x2F271
_SUCCESS, _REQUEST, _SUMMARY = 0, 4, 6
_SECONDS: Final = 10.0
_MOST_BYTES: Final = 1 << 20  # of a message, as in TVM
_WRONG: Final = (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Address:
    """`HOST:PORT`."""

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Address:
        """Raises `UsageError`."""
        match = re.fullmatch(r"([A-Za-z0-9.:_-]+):(\d{1,5})", text)
        if match is None or not 0 < int(match[2]) < 1 << 16:
            raise UsageError(f"{text!r} is not an address", hint="HOST:PORT, as in 192.168.1.10:9190")
        return Address(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Tracker:
    """Every call is a connection of its own. All raise `EnvironmentMissingError`."""

    address: Address

    def devices(self) -> dict[str, int]:
        """Key → how many servers offer devices of it, busy or free."""
        found: dict[str, int] = {}
        with self._answer([_SUMMARY]) as answer:
            for server in answer[1]["server_info"]:
                key = server["key"].removeprefix("server:")
                found[key] = found.get(key, 0) + 1
        return found

    def free(self, key: str) -> bool:
        """Whether a device of `key` waits for somebody."""
        with self._answer([_SUMMARY]) as answer:
            return int(answer[1]["queue_info"].get(key, {"free": 0})["free"]) > 0

    def request(self, key: str) -> tuple[Address, str]:
        """(a server that is ours now, the word that opens it)."""
        with self._answer([_REQUEST, key, "", 1]) as answer:
            host, port, word = answer[1]
            if not isinstance(word, str):
                raise TypeError(word)
            return Address.parse(f"{host}:{port}"), word

    @contextmanager
    def _answer(self, question: list[Any]) -> Iterator[Any]:
        """The answer; what is wrong with its form inside of the block is an error of the tracker's."""
        try:
            with socket.create_connection((self.address.host, self.address.port), _SECONDS) as connection:
                stream = connection.makefile("rb")
                connection.sendall(struct.pack("<i", _MAGIC))
                if self._number(stream) != _MAGIC:
                    raise ValueError("another magic number")
                data = json.dumps(question).encode()
                connection.sendall(struct.pack("<i", len(data)) + data)
                size = self._number(stream)
                if not 0 < size <= _MOST_BYTES:
                    raise ValueError(f"a message of {size} bytes")
                answer = json.loads(stream.read(size))
            if answer[0] != _SUCCESS:
                raise ValueError(str(answer))
            yield answer
        except OSError as error:
            raise EnvironmentMissingError(
                f"no RPC tracker answers at {self.address}: {error.strerror or error}",
                hint="python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190",
            ) from None
        except (*_WRONG, struct.error, UsageError) as error:
            raise EnvironmentMissingError(
                f"what answers at {self.address} is not an RPC tracker: {error!r:.200}"
            ) from None

    @staticmethod
    def _number(stream: Any) -> int:
        return int(struct.unpack("<i", stream.read(4))[0])
