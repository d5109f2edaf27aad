"""A TCP proxy between a device and its server that breaks one connection at one chosen byte.

`arm` a Fault: it waits for its moment (a function of the bytes that pass) and then does what its kind says. One asyncio
loop in a thread of its own carries all connections; tests, `make faults` and `make soak` stand on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benchmarks.faults.tap import Seen, Tap
from common.meter import DOWN, UP
from common.rpc import split_pb2 as pb

T = TypeVar("T")

CUT = "cut"  # both ends are reset: what was not read yet is lost
CLOSE = "close"  # both ends are told, in order, that nothing more comes
HOLE = "black hole"  # bytes of both ways vanish, and neither end is told
DELAY = "delay"  # bytes of this way wait for some seconds
DUPLICATE = "duplicate connection"  # what the device has sent so far arrives on a second connection once more
TRUNCATE = "truncated frame"  # a part of the bytes arrives, then the end
FLIP = "flipped bit"  # one bit arrives as its opposite
CALL = "call"  # `act` is called, and with `lossy` the connection is cut: for signals to the processes
KINDS = (CUT, CLOSE, HOLE, DELAY, DUPLICATE, TRUNCATE, FLIP)

_CHUNK = 1 << 16
# What one connection's duplicate can repeat; more than the harness's runs send.
_REMEMBERED = 16 << 20
# After an orderly end the two sides have this long to hang up by themselves.
_PARTING_S = 5.0


@dataclass(frozen=True)
class Chunk:
    """Some bytes on their way, and what is in them."""

    way: str
    data: bytes
    messages: list[Seen]
    step: int  # the highest one whose StepDone came down before this chunk, in the whole run; -1: none


@dataclass(frozen=True)
class Span:
    """Where in a chunk a fault happens: the bytes of a message, say."""

    start: int
    end: int

    def at(self, part: float) -> int:
        return self.start + int(part * (self.end - self.start))


Moment = Callable[[Chunk], Span | None]


def any_bytes(chunk: Chunk) -> Span | None:
    """The next bytes of either way."""
    return Span(0, len(chunk.data))


@dataclass
class Fault:
    kind: str
    moment: Moment = any_bytes
    part: float = 0.0  # how much of the span still passes: 0 nothing, 1 all of it
    # DELAY: how long. HOLE: so long the whole path is dark, then what was in it is cut; 0: this connection stays dark
    # for good, until its ends give it up, and others pass.
    seconds: float = 0.0
    bit: float = 0.5  # FLIP: which bit of the span, as a share of all
    act: Callable[[], None] = lambda: None
    lossy: bool = False
    fired: threading.Event = field(default_factory=threading.Event)


class _Link:
    """One connection of a device, and the one to the server that belongs to it."""

    def __init__(self, ends: dict[str, tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        self.ends = ends  # by the way that is read from it: UP the device's, DOWN the server's
        self.taps = {way: Tap(way) for way in ends}
        self.sent = bytearray()  # by the device
        self.dark = False

    def sink(self, way: str) -> asyncio.StreamWriter:
        return self.ends[DOWN if way == UP else UP][1]

    async def forward(self, way: str, data: bytes) -> None:
        if data and not self.dark:
            self.sink(way).write(data)
            await self.sink(way).drain()

    def cut(self) -> None:
        for _, writer in self.ends.values():
            _reset(writer)

    def end(self) -> None:
        """Tell both ends that nothing more comes, and listen to neither any more."""
        self.dark = True
        for _, writer in self.ends.values():
            if writer.can_write_eof():
                writer.write_eof()

    def close(self) -> None:
        for _, writer in self.ends.values():
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        end = writer.get_extra_info("socket")
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Proxy:
    """Listens on `address`, hands everything on to `target`; without a target, connections are reset."""

    def __init__(self, target: str = "", remember: bool = True) -> None:
        self.target = target
        self.step = -1  # the highest whose StepDone has come down
        self.replayed = 0  # activations that went up for a step that had been sent before
        self.connections = 0
        self._highest_sent = -1
        self._remember = remember
        self._fault: Fault | None = None
        self._dark_until = 0.0
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._welcome, "127.0.0.1", 0, limit=_CHUNK))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def arm(self, fault: Fault) -> Fault:
        """Have `fault` happen at its moment; one that was armed before and has not happened is forgotten."""
        self._fault = fault
        return fault

    def disarm(self) -> None:
        self._fault = None

    def cut(self) -> None:
        """Reset every connection now."""

        async def cut() -> None:
            for link in list(self._links):
                link.cut()

        self._call(cut())

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            for link in list(self._links):
                link.cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._call(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # Everything below runs in the loop's thread.

    def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._own(self._loop.create_task(self._accept(reader, writer)))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._loop.time() < self._dark_until:
            await self._swallow(reader, self._dark_until - self._loop.time())
            _reset(writer)
            return
        server = await self._reach()
        if server is None:
            _reset(writer)
            return
        link = _Link({UP: (reader, writer), DOWN: server})
        self._links.add(link)
        try:
            await asyncio.gather(self._pump(link, UP), self._pump(link, DOWN))
        finally:
            self._links.discard(link)
            link.close()

    def _own(self, task: asyncio.Task[None]) -> None:
        """Keep the task, to end it in `close`."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        if not self.target:
            return None
        host, _, port = self.target.rpartition(":")
        try:
            return await asyncio.open_connection(host, int(port), limit=_CHUNK)
        except OSError:
            return None

    async def _swallow(self, reader: asyncio.StreamReader, seconds: float) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(seconds):
                while await reader.read(_CHUNK):
                    pass

    async def _pump(self, link: _Link, way: str) -> None:
        """Carry one way to its end."""
        reader, sink = link.ends[way][0], link.sink(way)
        try:
            while data := await reader.read(_CHUNK):
                chunk = Chunk(way, data, link.taps[way].feed(data), self.step)
                if not link.dark:
                    self._count(chunk)
                if way == UP and self._remember and len(link.sent) < _REMEMBERED:
                    link.sent += data
                fault = None if link.dark else self._fault
                span = fault.moment(chunk) if fault else None
                if fault and span:
                    self._fault = None
                    await self._strike(fault, span, link, way, data)
                else:
                    await link.forward(way, data)
            if not link.dark and sink.can_write_eof():  # in a black hole an end is no more heard than bytes are
                sink.write_eof()
        except OSError:
            if not link.dark:
                link.cut()  # one end was reset: so is the other

    def _count(self, chunk: Chunk) -> None:
        for frame in (seen.frame for seen in chunk.messages if seen.frame):
            if chunk.way == DOWN and frame.HasField("done"):
                self.step = max(self.step, frame.step)
            elif chunk.way == UP and frame.role == pb.ACTIVATION and frame.part.HasField("tensor"):
                self.replayed += frame.step <= self._highest_sent
                self._highest_sent = max(self._highest_sent, frame.step)

    async def _strike(self, fault: Fault, span: Span, link: _Link, way: str, data: bytes) -> None:
        place = span.at(fault.part)
        before, after = data[:place], data[place:]
        if fault.kind == FLIP:
            bit = 8 * span.start + int(fault.bit * 8 * (span.end - span.start))
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            before, after = b"", bytes(changed)
        await link.forward(way, before)
        if fault.kind == CUT:
            link.cut()
        elif fault.kind in (CLOSE, TRUNCATE):
            link.end()
            self._loop.call_later(_PARTING_S, link.close)
        elif fault.kind == HOLE:
            self._darken(link, fault.seconds)
        elif fault.kind == DUPLICATE:
            sent = len(link.sent) - (len(after) if way == UP else 0)
            self._own(self._loop.create_task(self._repeat(bytes(link.sent[:sent]))))
        elif fault.kind == CALL:
            fault.act()
            if fault.lossy:
                link.cut()
        fault.fired.set()
        if fault.kind == DELAY:
            await asyncio.sleep(fault.seconds)
        if fault.kind in (DELAY, DUPLICATE, FLIP) or (fault.kind == CALL and not fault.lossy):
            await link.forward(way, after)

    def _darken(self, link: _Link, seconds: float) -> None:
        if not seconds:
            link.dark = True
            return
        self._dark_until = self._loop.time() + seconds
        for one in self._links:
            one.dark = True
            self._loop.call_later(seconds, one.cut)

    async def _repeat(self, sent: bytes) -> None:
        """Say `sent` to the server on a connection of its own, and stay to hear the answers for a while."""
        server = await self._reach()
        if server is None:
            return
        reader, writer = server
        with contextlib.suppress(OSError):
            writer.write(sent)
            await writer.drain()
        await self._swallow(reader, 2.0)
        writer.close()
