"""The seam between those who call or serve experts and the bytes in between. Owns: the two protocols and what they pass.

A transport carries one call to one peer and brings back one reply, or raises one of ``moe.errors``. It retries nothing and
chooses nobody. ``moe.transport.memory`` is the double for tests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from moe.errors import CallTimeout, MoEError
from moe.expert_uid import PeerIDLike
from moe.schema import Compression
from moe.transport.inflight import InflightBytes, Reservation
from moe.wire.messages import ExpertDescription, ReplyHeader, RequestHeader

T = TypeVar("T")

FORWARD, BACKWARD = "forward", "backward"
_CANCEL_GRACE_S = 1.0  # for what was waited for to clean up; it is not waited for any longer
INFO, TICKET = "info", "ticket"  # what a server may be asked for besides


@dataclass(frozen=True)
class Call:
    """One request for one expert.

    :ivar method: FORWARD or BACKWARD
    :ivar uid: the expert, or a chain of them
    :ivar header: what a native peer is told; None for a stock peer
    :ivar tensors: flat, on CPU
    :ivar codecs: one per tensor
    :ivar reply_bytes: about how large the reply will be, to choose between a unary and a streamed call
    :ivar reply_codecs: in which the reply's tensors may travel; others are refused before they are decoded
    """

    method: str
    uid: str
    header: RequestHeader | None
    tensors: Sequence[torch.Tensor]
    codecs: Sequence[int]
    reply_bytes: int = 0
    reply_codecs: Collection[int] = frozenset(Compression)

    @property
    def request_bytes(self) -> int:
        """Size of the tensors, uncompressed."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Reply:
    """What came back: tensors on CPU, and a header from native peers. Errors are raised, never returned.

    :ivar codecs: one per tensor; how a server wants them to travel
    """

    header: ReplyHeader | None
    tensors: Sequence[torch.Tensor]
    codecs: Sequence[int] = ()


CallBlocking = Callable[[Call, "float | None"], Reply]
"""(call, timeout_s) -> reply; raises what ``ExpertTransport.call`` does."""


class ExpertTransport(Protocol):
    """The client's side. All methods run in the client's event loop."""

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        """What an expert takes and returns."""
        ...

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """Carry one call; cancelling it tells the server that nobody waits any more."""
        ...

    async def close(self) -> None:
        """Drop all connections."""
        ...


@runtime_checkable
class BlockingCalls(Protocol):
    """What an ExpertTransport may offer besides: calls by a thread that waits for them, without the event loop's help."""

    def blocking(self, peer: PeerIDLike) -> CallBlocking | None:
        """``ExpertTransport.call`` for the thread that asks; None if calls of this peer must be made in the event loop."""
        ...


class Admission(Protocol):
    """A request that a server is willing to receive, before any of its tensors has been.

    It is also the gate its tensors pass: see ``TensorGate`` in moe.wire.hivemind_dialect.
    """

    @property
    def deadline(self) -> float:
        """Monotonic time at which nobody waits for the answer any more; whatever is not received until then is not wanted."""
        ...

    @property
    def reservation(self) -> Reservation:
        """The memory of the request. Transports count there what they hold besides what is admitted and answered."""
        ...

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        """Most bytes this tensor may have on the wire; raises if its declaration alone is wrong."""
        ...

    async def run(self, tensors: Sequence[torch.Tensor]) -> Reply:
        """Serve the request. Cancelling withdraws it."""
        ...

    def start(self, tensors: Sequence[torch.Tensor], answer: Callable[[Reply | MoEError], None]) -> bool:
        """``run`` without a coroutine, where one task is all there is to do.

        :param answer: gets the reply, or the error, from whichever thread has it; maybe more than once, the first one counts
        :returns: False if the request has to be run
        :raises MoEError: it is refused
        """
        ...

    def release(self) -> None:
        """Give back what the admission holds, and withdraw what was started. Called once the answer has left this process or
        can never leave it, whatever happens; again does no harm."""
        ...


class ExpertService(Protocol):
    """The server's side: what a transport hands requests to. All methods run in the server's event loop."""

    @property
    def read_timeout_s(self) -> float:
        """Longest silence while a request is being received."""
        ...

    @property
    def inflight(self) -> InflightBytes:
        """Memory taken for peers. Transports count here what they hold of requests that are not admitted yet."""
        ...

    def describe(self, peer: str, uid: str) -> ExpertDescription:
        """What an expert takes and returns, for a peer that asks.

        :raises Refused: this peer may not know
        :raises ExpertNotFound: no such expert
        """
        ...

    def allow_ticket(self, peer: str) -> None:
        """May the peer have a direct link? Asked before a ticket for one is issued.

        :raises Refused: it may not
        """
        ...

    def open(self, peer: str, method: str, uid: str, header: RequestHeader | None) -> Admission:
        """Admit a request by its header.

        :raises MoEError: if it is refused
        """
        ...


async def within(awaitable: Awaitable[T], timeout_s: float | None, what: str, peer: str | None = None) -> T:
    """Await with a deadline. A cancellation is never lost, as it can be in ``asyncio.wait_for`` before Python 3.12.

    :raises CallTimeout: naming what took too long
    """
    if timeout_s is None:
        return await awaitable
    waited = asyncio.ensure_future(awaitable)
    try:
        in_time, _ = await asyncio.wait({waited}, timeout=max(0.0, timeout_s))
        if not in_time:
            await end(waited)
    except asyncio.CancelledError:
        await end(waited)
        raise
    if in_time or (waited.done() and not waited.cancelled()):
        return waited.result()
    raise CallTimeout(f"{what}: no answer within {timeout_s:.3g} s", peer=peer)


async def end(waited: asyncio.Future[Any]) -> None:
    """Cancel it, and let it clean up."""
    waited.cancel()
    ended, _ = await asyncio.wait({waited}, timeout=_CANCEL_GRACE_S)
    if ended and not waited.cancelled():
        waited.exception()  # else asyncio says that nobody has looked


async def answered_within(answer: asyncio.Future[T], timeout_s: float | None, what: str, peer: str | None = None) -> T:
    """``within`` for a bare future of this loop, at a tenth of the cost.

    :raises CallTimeout: naming what took too long; the future holds the same error then
    """
    if timeout_s is None:
        return await answer

    def expire() -> None:
        if not answer.done():
            answer.set_exception(CallTimeout(f"{what}: no answer within {timeout_s:.3g} s", peer=peer))

    timer = asyncio.get_running_loop().call_later(max(0.0, timeout_s), expire)
    try:
        return await answer
    finally:
        timer.cancel()


class Budget:
    """A time budget shared by several waits."""

    def __init__(self, total_s: float | None):
        self.total_s = total_s
        self._deadline = None if total_s is None else time.monotonic() + total_s

    def left_s(self, at_most_s: float | None = None) -> float | None:
        """Seconds left, not more than ``at_most_s``; None without any limit.

        :raises CallTimeout: if nothing is left
        """
        if self._deadline is None:
            return at_most_s
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise CallTimeout(f"the time budget of {self.total_s:.3g} s is used up")
        return left if at_most_s is None else min(left, at_most_s)
