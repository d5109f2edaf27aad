"""A device that does what no device should, until it is ended: `python -m benchmarks.hostile HOST:PORT`.

It runs at a low priority, for what it computes itself is not the server's to bound: only what it makes the server
do may slow down others. limits.py runs it beside a well-behaved device.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
import numpy as np

from benchmarks.recipes import CLASSES
from common import channel, wire
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.wire import Place


def random_bytes(address: str) -> None:
    """Whatever comes, on connections of their own; every other one after HTTP/2's greeting."""
    host, port = channel.parse_address(address)
    greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" * random.randrange(2)
    with socket.create_connection((host, port), timeout=5) as link:
        link.sendall(greeting + random.randbytes(20_000))
        link.recv(1000)


def opens(stub: split_pb2_grpc.SplitStub) -> None:
    """Handshakes without end, many at once."""
    request = wire.seal(
        pb.OpenRequest(protocol_version=wire.PROTOCOL_VERSION, purpose=random.choice([pb.TRAIN, pb.USE]))
    )
    calls = [stub.Open.future(request) for _ in range(50)]
    for call in calls:
        call.exception()


def wrong_order(stub: split_pb2_grpc.SplitStub) -> None:
    """Frames that are valid, none of them where it belongs."""
    session = random.choice(["", "nobody's", "\0" * 300])
    begin = wire.seal(Place(pb.CONTROL, 0, 0).frame(begin=pb.Begin(session=session, samples=1438, classes=CLASSES)))
    leave = wire.seal(Place(pb.CONTROL, 7, 0).frame(leave=pb.Leave(finished=True)))
    recall = wire.seal(Place(pb.CONTROL, 0, 0).frame(recall=pb.Recall(steps=2**32 - 1)))
    some = list(wire.pack_raw(Place(pb.ACTIVATION, 3, 1), np.zeros((32, 32, 8, 8), np.float32)))
    frames = random.choices([begin, leave, recall, *some], k=6)
    for method in (stub.Train, stub.Evaluate):
        list(method(iter(frames)))


def silent(stub: split_pb2_grpc.SplitStub) -> None:
    """Streams that are opened and never say anything, until they are ended."""

    def nothing() -> Iterator[pb.Frame]:
        time.sleep(3600)
        yield pb.Frame()

    calls = [stub.Train(nothing()) for _ in range(20)]
    for call in calls:
        call.exception()


def unread(stub: split_pb2_grpc.SplitStub) -> None:
    """Frames without end on a stream whose answers are not read."""
    frames = list(wire.pack_raw(Place(pb.EVALUATION, 0, 0), np.zeros((256, 32, 8, 8), np.float32)))

    def endless() -> Iterator[pb.Frame]:
        while True:
            yield from frames

    call = stub.Evaluate(endless())
    call.exception()


DONE: Counter[str] = Counter()


def forever(name: str, act: Callable[[], None]) -> None:
    while True:
        DONE[name] += 1
        with contextlib.suppress(grpc.RpcError, OSError):
            act()
        time.sleep(0.001)


def main(address: str) -> None:
    os.nice(10)
    for act in (opens, wrong_order, silent, unread):
        # A connection for each, so that none waits for another's place.
        stub = split_pb2_grpc.SplitStub(grpc.insecure_channel(address, options=channel.DEVICE_OPTIONS))
        threading.Thread(target=forever, args=(act.__name__, functools.partial(act, stub)), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: tell())
    print("at work", flush=True)
    forever("random_bytes", functools.partial(random_bytes, address))


def tell() -> None:
    """How often each was begun; the end."""
    print(*(f"{name}={count}" for name, count in DONE.items()), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
