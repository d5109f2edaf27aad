"""Reads our messages out of a connection's bytes as they pass, so that a fault can be placed at one of them.

Knows as much of HTTP/2 as that takes: frame headers, and gRPC's five bytes before each message. Under TLS, or after
anything that it doesn't understand, it sees nothing more and says so; the bytes are never held up. The proxy calls it.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from common.meter import DOWN, UP
from common.rpc import split_pb2 as pb

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # what a client says first
_HEADER = 9  # of a HTTP/2 frame: length (3), type, flags, stream (4)
_DATA = 0
_PREFIX = 5  # of a gRPC message: compressed or not, length (4)
# A longer frame than gRPC ever makes of ours: these bytes are not HTTP/2 in the clear.
_LONGEST = 1 << 22


@dataclass(frozen=True)
class Seen:
    """A message whose last byte is in the present chunk; `start` is 0 where it began in an earlier one."""

    number: int  # of this direction of the connection, from 0
    frame: pb.Frame | None  # None: one of the handshake's, which are no frames
    start: int
    end: int


class Tap:
    """One direction of one connection."""

    def __init__(self, way: str) -> None:
        self.clear = True  # false: nothing can be read here
        self._expected = _PREFACE if way == UP else b""
        # A server's first frame is SETTINGS, some bytes long; a TLS record starts with 0x16.
        self._first = b"\0" if way == DOWN else _PREFACE[:1]
        self._rest = b""
        self._passed = 0  # bytes before those in `_rest`
        self._messages: dict[int, tuple[int, bytearray]] = {}  # by stream: where it began, what came of it
        self._number = 0

    def feed(self, chunk: bytes) -> list[Seen]:
        """The messages that `chunk`, the next bytes to pass, completes."""
        if not self.clear:
            return []
        if not self._passed and not self._rest and not chunk.startswith(self._first):
            self.clear = False
            return []
        base = self._passed + len(self._rest)  # the connection's byte that is the chunk's byte 0
        self._rest += chunk
        seen: list[Seen] = []
        if self._expected:
            if len(self._rest) < len(self._expected):
                return []
            self.clear = self._rest.startswith(self._expected)
            self._drop(len(self._expected))
            self._expected = b""
        while self.clear and len(self._rest) >= _HEADER:
            length = int.from_bytes(self._rest[:3], "big")
            kind, stream = self._rest[3], int.from_bytes(self._rest[5:9], "big") & 0x7FFFFFFF
            if length > _LONGEST:
                self.clear = False
                self._rest = b""
                break
            if len(self._rest) < _HEADER + length:
                break
            if kind == _DATA:
                self._data(stream, self._rest[_HEADER : _HEADER + length], seen, base)
            self._drop(_HEADER + length)
        return seen

    def _drop(self, count: int) -> None:
        self._rest = self._rest[count:]
        self._passed += count

    def _data(self, stream: int, data: bytes, seen: list[Seen], base: int) -> None:
        """The bytes of one DATA frame: the end of a message, whole ones, the start of another."""
        place = self._passed + _HEADER
        while data:
            began, message = self._messages.setdefault(stream, (place, bytearray()))
            wanted = _PREFIX - len(message)
            if wanted <= 0:
                wanted = _PREFIX + int.from_bytes(message[1:_PREFIX], "big") - len(message)
            taken, data = data[:wanted], data[wanted:]
            message += taken
            place += len(taken)
            if len(message) >= _PREFIX and len(message) == _PREFIX + int.from_bytes(message[1:_PREFIX], "big"):
                seen.append(Seen(self._number, _frame(message[_PREFIX:]), max(0, began - base), place - base))
                self._number += 1
                del self._messages[stream]


def _frame(message: bytearray) -> pb.Frame | None:
    try:
        frame = pb.Frame.FromString(bytes(message))
    except DecodeError:
        return None
    return frame if frame.WhichOneof("body") else None
