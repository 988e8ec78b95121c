"""Memory of requests is free when they are over, not at the next garbage collection: it is bounded by what is counted.

A cycle of references would hold the tensors of a request for as long as it pleases the collector, which looks at old objects
rarely and counts objects, not bytes: a server of 16 MiB calls held more than a gigabyte of calls that were over.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from moe.config import HandlerConfig
from moe.errors import CallTimeout, MoEError
from moe.schema import BatchTensorProto, Compression
from moe.server.expert_backend import ExpertBackend
from moe.transport.base import BACKWARD, FORWARD, Call
from moe.transport.direct import DirectClient
from moe.wire.messages import RequestHeader, new_request_id
from tests.transport.test_direct import Host, SlowExpert

WIDTH = 1027  # tensors of this width are the requests'
ROWS = 64
CALLS = 5


class Picky(torch.nn.Module):
    """Fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] == 13:
            raise ValueError("not this one")
        return self.linear(x)


@pytest.fixture
def host() -> Iterator[Host]:
    picky, slow = Picky(), SlowExpert()
    slow.delay_s = 0.05
    schema = (BatchTensorProto(WIDTH),)
    backends = {
        "picky.0": ExpertBackend("picky.0", picky, torch.optim.Adam(picky.parameters()), args_schema=schema),
        "frozen.0": ExpertBackend("frozen.0", Picky(), args_schema=schema),
        "slow.0": ExpertBackend("slow.0", slow, args_schema=schema),
    }
    with Host(backends, HandlerConfig(once_max_replies=1)) as running:
        yield running


def _call(method: str, uid: str, x: torch.Tensor, **header: Any) -> Call:
    tensors = [x] if method == FORWARD else [x, torch.ones_like(x)]
    told = RequestHeader(request_id=new_request_id(), time_left_s=30.0, **header)
    return Call(method, uid, told, tensors, [Compression.NONE] * len(tensors), reply_bytes=x.nbytes)


def _forward(client: DirectClient) -> None:
    client.call_blocking(_call(FORWARD, "frozen.0", torch.ones(ROWS, WIDTH)), 30.0)


def _kept_forward_and_backward(client: DirectClient) -> None:
    x = torch.ones(ROWS, WIDTH)
    client.call_blocking(_call(FORWARD, "picky.0", x, keep=True), 30.0)
    client.call_blocking(_call(BACKWARD, "picky.0", x), 30.0)


def _frozen_backward(client: DirectClient) -> None:
    client.call_blocking(_call(BACKWARD, "frozen.0", torch.ones(ROWS, WIDTH)), 30.0)


def _failing_expert(client: DirectClient) -> None:
    for method in (FORWARD, BACKWARD):
        with contextlib.suppress(MoEError):
            client.call_blocking(_call(method, "picky.0", torch.full((ROWS, WIDTH), 13.0)), 30.0)


def _refused(client: DirectClient) -> None:
    x = torch.ones(ROWS, WIDTH)
    for call in (_call(FORWARD, "no.such", x), _call(FORWARD, "frozen.0", x, present=("nothing",))):
        with contextlib.suppress(MoEError):
            client.call_blocking(call, 30.0)


def _given_up(client: DirectClient) -> None:
    for method in (FORWARD, BACKWARD):
        with contextlib.suppress(CallTimeout):
            client.call_blocking(_call(method, "slow.0", torch.ones(ROWS, WIDTH)), 0.01)


def _too_late(client: DirectClient) -> None:
    x = torch.ones(ROWS, WIDTH)
    call = Call(FORWARD, "slow.0", RequestHeader(time_left_s=0.01), [x], [Compression.NONE], reply_bytes=x.nbytes)
    with contextlib.suppress(MoEError):
        client.call_blocking(call, 30.0)


@pytest.mark.parametrize(
    "exchange",
    [_forward, _kept_forward_and_backward, _frozen_backward, _failing_expert, _refused, _given_up, _too_late],
)
def test_nothing_of_a_request_is_left_to_the_garbage_collector(
    host: Host, exchange: Callable[[DirectClient], None]
) -> None:
    with host.link("unix") as client:
        exchange(client)
        _settle(host)
        gc.collect()
        gc.disable()
        try:
            gc.set_debug(gc.DEBUG_SAVEALL)  # what is found is kept in gc.garbage
            for _ in range(CALLS):
                exchange(client)
            _settle(host)
            gc.collect()
            left = [tuple(o.shape) for o in gc.garbage if _is_of_a_request(o)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not left, f"{len(left)} tensors of {CALLS} exchanges were held by cycles of references"


def _is_of_a_request(found: object) -> bool:
    return type(found) is torch.Tensor and found.ndim == 2 and found.shape[-1] == WIDTH and len(found) <= ROWS


def _settle(host: Host) -> None:
    """Wait until the server has nothing to do any more."""
    host.await_release()
    pools = [pool for backend in host.backends.values() for pool in backend.get_pools()]
    deadline = time.monotonic() + 10.0
    while not all(pool.empty for pool in pools) or host.runtime.busy_s():
        assert time.monotonic() < deadline
        time.sleep(0.01)

    async def a_turn() -> None:
        await asyncio.sleep(0.02)

    for loop in (host.server_loop, host.client_loop):
        loop.run(a_turn(), 5.0)
