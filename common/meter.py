"""Counts what crosses the link, by direction and role, at two of three depths; the kernel's is in tcp_info.py.

- payload: what the codec made (labels and weights: their raw bytes). Leaves out everything below.
- message: the serialised protobuf message: payload, shape, step, phase, field tags. Leaves out HTTP/2 frames and
  headers (9 bytes a frame of 16 KiB, some hundred bytes at a stream's start), TLS records, TCP and IP headers.
- kernel: what TCP really moved, HTTP/2, TLS and retransmissions included. Leaves out TCP/IP and link headers.

Beside them stands raw: the bytes of the same tensor as fp32 before the codec, so payload / raw is the codec's
share. Both sides count the same messages with the same function, so their books must agree to the byte.

The books hold what the run needed: each step and each evaluation once, as in a run without faults. What faults cost
beside that (frames of a broken stream, answers sent once more, steps made once more, handshakes of a reconnect)
stands apart, as `again`; there the two sides need not agree, for what is lost is seen by its sender alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from common.rpc import split_pb2 as pb

ROLES = ("activation", "gradient", "label", "evaluation", "weights", "control")  # as tables show them
UP, DOWN = "up", "down"
MOST_SIDES = 8  # of a tensor's shape
_NAMES = {pb.Role.Value(role.upper()): role for role in ROLES}


@dataclass
class Count:
    raw: int = 0
    payload: int = 0
    message: int = 0

    def add(self, other: Count) -> None:
        self.raw += other.raw
        self.payload += other.payload
        self.message += other.message


def count_of(frame: pb.Frame) -> tuple[str, Count]:
    """Role of a frame and what it adds there; raw stands in part 0, which alone knows the shape."""
    data = len(frame.part.data)
    raw = 0
    if frame.HasField("part") and frame.part.HasField("tensor"):
        tensor = frame.part.tensor
        raw = tensor.payload
        if tensor.dtype == "float32":
            # A shape with more sides is refused where it is looked at; their product would take minutes.
            raw = 4 * math.prod(tensor.shape) if len(tensor.shape) <= MOST_SIDES else 0
    # A frame is counted before it is checked, so its role may be none; wire.py then refuses it.
    return _NAMES.get(frame.role, "control"), Count(raw, data, frame.ByteSize())


class Meter:
    """One run's books on one side (before a run has begun, one visit's); safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lap = {UP: 0, DOWN: 0}
        self._books = {way: {role: Count() for role in ROLES} for way in (UP, DOWN)}
        self._again = {UP: 0, DOWN: 0}

    def frame(self, way: str, frame: pb.Frame, again: bool = False) -> pb.Frame:
        """Count `frame` going `way` ("up" from the device, "down" to it) and hand it on; `again`: sent for a fault."""
        role, count = count_of(frame)
        with self._lock:
            if again:
                self._again[way] += count.message
            else:
                self._books[way][role].add(count)
        return frame

    def control(self, way: str, message: Any, again: bool = False) -> None:
        """Count a message of the handshake; `again` where a fault made it necessary."""
        with self._lock:
            if again:
                self._again[way] += message.ByteSize()
            else:
                self._books[way]["control"].message += message.ByteSize()

    def settle(self, counts: Mapping[tuple[str, str], Count], done: bool) -> None:
        """Count what a Draft holds, by way and role: as needed where it is `done`, else as sent again."""
        with self._lock:
            for (way, role), count in counts.items():
                if done:
                    self._books[way][role].add(count)
                else:
                    self._again[way] += count.message

    def again(self, way: str) -> int:
        """Bytes of messages that were sent for faults."""
        with self._lock:
            return self._again[way]

    def total(self, way: str) -> Count:
        with self._lock:
            total = Count()
            for count in self._books[way].values():
                total.add(count)
        return total

    def report(self, kernel_up: int | None, kernel_down: int | None) -> dict[str, Any]:
        """The "bytes" field of summary.json."""
        result: dict[str, Any] = {}
        for way, kernel in ((UP, kernel_up), (DOWN, kernel_down)):
            total = self.total(way)
            with self._lock:
                by_role = {role: asdict(count) for role, count in self._books[way].items() if count.message}
            result[way] = {
                "payload": total.payload, "message": total.message, "kernel": kernel, "again": self._again[way],
                "by_role": by_role,
            }  # fmt: skip
        return result

    def state(self) -> dict[str, Any]:
        """The books as JSON, for a checkpoint."""
        with self._lock:
            books = {way: {role: asdict(count) for role, count in book.items()} for way, book in self._books.items()}
            return {"books": books, "again": dict(self._again)}

    def restore(self, state: dict[str, Any], lost: dict[str, int] | None = None) -> None:
        """Go back to the books of a checkpoint; what was counted after it counts as sent again.

        `lost`: in a new process, which knows nothing of that by itself, how many bytes it was each way.
        """
        with self._lock:
            before = {way: sum(count.message for count in book.values()) for way, book in self._books.items()}
            self._books = {
                way: {role: Count(**state["books"][way].get(role, {})) for role in ROLES} for way in (UP, DOWN)
            }
            for way, book in self._books.items():
                if lost is None:
                    self._again[way] += before[way] - sum(count.message for count in book.values())
                else:
                    self._again[way] += before[way] + state["again"][way] + lost[way]
        self.lap()

    def lap(self) -> dict[str, int]:
        """Message bytes up and down since the last lap, evaluations left out: called at the end of each step."""
        with self._lock:
            now = {
                way: sum(count.message for role, count in book.items() if role != "evaluation")
                for way, book in self._books.items()
            }
            before, self._lap = self._lap, now
        return {way: now[way] - before[way] for way in now}


class Draft:
    """The frames of something that is not done yet, such as a step. Once it is, they count in the books (`keep`).

    Where it is given up they count as sent again (`drop`, also by leaving its `with`).
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._counts: dict[tuple[str, str], Count] = {}  # sums, not frames: an evaluation may have any number of these

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def frame(self, way: str, frame: pb.Frame) -> pb.Frame:
        role, count = count_of(frame)
        self._counts.setdefault((way, role), Count()).add(count)
        return frame

    def keep(self) -> None:
        self._settle(done=True)

    def drop(self) -> None:
        self._settle(done=False)

    def _settle(self, done: bool) -> None:
        counts, self._counts = self._counts, {}
        self._meter.settle(counts, done)
