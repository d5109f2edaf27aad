"""A broken stream leaves nothing behind in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import grpc
import pytest

from common.errors import LinkError
from common.meter import Draft, Meter
from device_client.link import Stream


class _Lost(grpc.RpcError):
    """A call that raises itself where the link is lost, as gRPC's calls do."""

    def __next__(self) -> None:
        raise self

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "lost"

    def trailing_metadata(self) -> tuple[()]:
        return ()


class _Batch:
    """What a step holds while it waits for its answer."""


def _step() -> weakref.ref[_Batch]:
    batch = _Batch()
    stream = Stream(lambda _: _Lost(), "127.0.0.1:1", watched=False)
    with pytest.raises(LinkError):
        stream.receive(Draft(Meter()))
    return weakref.ref(batch)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_a_broken_stream_is_freed_without_the_garbage_collector(no_collector: None) -> None:
    assert _step()() is None
