"""Calls to a service of this process: the same encoding, bounds and errors as on the wire, without one.

Owns: handing encoded calls to an ExpertService, and the servers behind this process's own libp2p daemon. That daemon does not
dial itself, so whoever calls a server through the server's own DHT is brought to it here. Must not know: what a call means.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import torch

from moe.errors import MoEError, Unavailable
from moe.transport.base import Call, ExpertService, Reply, within
from moe.transport.tickets import Ticket
from moe.wire.hivemind_dialect import (
    ExpertRequest,
    ExpertResponse,
    TensorAssembler,
    decode_info,
    encode_info,
    stream_requests,
    stream_responses,
)
from moe.wire.messages import (
    ExpertDescription,
    ReplyHeader,
    WireError,
    decode_reply_header,
    decode_request_header,
    encode_header,
)
from moe.wire.tensors import decode_tensor, encode_tensor

T = TypeVar("T")


def describe(service: ExpertService, caller: str, uid: str) -> ExpertDescription:
    """What an expert takes and returns, as a caller reads it.

    :param caller: the peer that the service sees
    """
    return decode_info(encode_info(service.describe(caller, uid)))


async def serve(service: ExpertService, caller: str, peer: str, call: Call) -> Reply:
    """Carry one call, in the service's event loop.

    :param caller: the peer that the service sees
    :param peer: the peer that the service is, for errors
    """
    metadata, tensors = await _serve(service, caller, call)
    header = decode_reply_header(metadata)
    if header is not None and header.error is not None:
        raise header.error.to_exception(peer=peer, uid=call.uid)
    return Reply(header, tensors)


async def _serve(service: ExpertService, caller: str, call: Call) -> tuple[bytes, list[torch.Tensor]]:
    encoded = [encode_tensor(tensor, codec) for tensor, codec in zip(call.tensors, call.codecs)]
    metadata = encode_header(call.header) if call.header is not None else b""
    try:
        wire = [message.SerializeToString() for message in stream_requests(call.uid, encoded, metadata)]
        messages = [ExpertRequest.FromString(data) for data in wire]
        admission = service.open(caller, call.method, call.uid, decode_request_header(messages[0].metadata))
        try:
            assembler = TensorAssembler(admission)
            for message in messages:
                for part in message.tensors:
                    assembler.feed(part)
            reply = await admission.run([decode_tensor(tensor) for tensor in assembler.finish()])
            answers = [encode_tensor(tensor, codec) for tensor, codec in zip(reply.tensors, reply.codecs)]
        finally:
            admission.release()
    except MoEError as e:
        return encode_header(ReplyHeader(error=WireError.from_exception(e))), []
    header = encode_header(reply.header) if reply.header is not None and metadata else b""  # as to a stock client
    assembled = TensorAssembler(_Unbounded())
    for message in stream_responses(answers, header):
        for part in ExpertResponse.FromString(message.SerializeToString()).tensors:
            assembled.feed(part)
    return header, [decode_tensor(tensor) for tensor in assembled.finish()]


class _Unbounded:
    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: object) -> int:
        return 2**62


class OwnServer:
    """A server of this process, for clients that share its libp2p daemon. Made in the server's event loop; its coroutines run
    in the client's.

    :param peer: base58 peer id of the daemon: the server's and its clients'
    :param service: what serves the requests
    :param issue_ticket: makes a ticket for a direct link; None: there are no direct links
    """

    def __init__(self, peer: str, service: ExpertService, issue_ticket: Callable[[str], Ticket] | None):
        self.peer, self.pid = peer, os.getpid()
        self._service, self._issue_ticket = service, issue_ticket
        self._loop = asyncio.get_running_loop()

    async def info(self, uid: str, timeout_s: float | None) -> ExpertDescription:
        """See ExpertTransport."""

        async def answer() -> ExpertDescription:
            return describe(self._service, self.peer, uid)

        return await self._ask(answer, timeout_s, f"rpc_info of {uid}")

    async def call(self, call: Call, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""

        async def answer() -> Reply:
            return await serve(self._service, self.peer, self.peer, call)

        return await self._ask(answer, timeout_s, f"{call.method} of {call.uid}")

    async def ticket(self, timeout_s: float | None) -> Ticket:
        """A ticket for a direct link.

        :raises Unavailable: there are none
        """

        async def answer() -> Ticket:
            if self._issue_ticket is None:
                raise Unavailable("this server has no direct links")
            self._service.allow_ticket(self.peer)
            return self._issue_ticket(self.peer)

        return await self._ask(answer, timeout_s, "asking for a direct link")

    async def _ask(self, answer: Callable[[], Awaitable[T]], timeout_s: float | None, what: str) -> T:
        """Await an answer in the server's event loop."""

        async def outcome() -> T | MoEError:
            """Errors are returned: nobody looks at one that is raised for a caller who has gone."""
            try:
                return await answer()
            except MoEError as e:
                return e.with_traceback(None)
            except asyncio.CancelledError:  # the caller has gone, or the server's event loop ends
                return Unavailable("the server has stopped", peer=self.peer)

        running = outcome()
        try:
            asked = asyncio.run_coroutine_threadsafe(running, self._loop)
        except RuntimeError:  # its loop was closed
            running.close()
            raise Unavailable("the server has stopped", peer=self.peer) from None
        result = await within(asyncio.wrap_future(asked), timeout_s, what, self.peer)
        if isinstance(result, MoEError):
            raise result
        return result


_own_servers: dict[str, OwnServer] = {}  # by control address of the libp2p daemon


def register(daemon_maddr: str, server: OwnServer) -> None:
    """From now on clients find it."""
    _own_servers[daemon_maddr] = server


def unregister(daemon_maddr: str, server: OwnServer | None) -> None:
    """From now on they do not."""
    if server is not None and _own_servers.get(daemon_maddr) is server:
        del _own_servers[daemon_maddr]


def find_own(daemon_maddr: str, peer: str) -> OwnServer | None:
    """The server of this process behind a libp2p daemon, if that daemon is this peer."""
    server = _own_servers.get(daemon_maddr)
    return server if server is not None and server.peer == peer and server.pid == os.getpid() else None
