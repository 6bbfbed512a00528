"""Stands in for `adb`: hands its command line to the `helpers_phone.AdbServer` of the test, as adb does to its own.

Few imports: a test starts it dozens of times.
"""

import _socket
import os
import sys

connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
try:
    connection.connect(os.environ["FAKE_ADB"])
except OSError as error:
    sys.exit(f"* cannot connect to daemon: {error}")
connection.send("\x1f".join(sys.argv[1:]).encode() + b"\n")
answer = b""
while part := connection.recv(1 << 16):
    answer += part
code, out, err = answer.split(b"\0", 2)
os.write(1, out)
os.write(2, err)
sys.exit(int(code))
