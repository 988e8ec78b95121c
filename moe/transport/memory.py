"""A transport inside one process, for tests: no sockets, but the same encoding, bounds and errors as on the wire.

Owns: handing encoded calls to an ExpertService. Part of the public test kit (``moe.testing``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe.errors import ConnectError, MoEError
from moe.expert_uid import PeerIDLike
from moe.transport.base import Call, ExpertService, Reply, within
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


@dataclass(frozen=True)
class MemoryPeer:
    """A peer id for tests: any name."""

    name: str

    def to_base58(self) -> str:
        """The name."""
        return self.name

    def to_bytes(self) -> bytes:
        """The name."""
        return self.name.encode()


class MemoryTransport:
    """Carries calls to services in this process, as bytes.

    :param services: by peer name; a peer that is missing (or was removed) cannot be connected to
    :param caller: the peer name that services see
    """

    def __init__(self, services: Mapping[str, ExpertService], caller: str = "client"):
        self.services, self.caller = services, caller
        self.calls: list[tuple[str, str, str]] = []  # (peer, method, uid), for assertions

    def _service(self, peer: PeerIDLike) -> ExpertService:
        service = self.services.get(peer.to_base58())
        if service is None:
            raise ConnectError("the peer cannot be reached", peer=peer.to_base58())
        return service

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        """See ExpertTransport."""
        self.calls.append((peer.to_base58(), "info", uid))
        return decode_info(encode_info(self._service(peer).describe(self.caller, uid)))

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""
        self.calls.append((peer.to_base58(), call.method, call.uid))
        name = peer.to_base58()
        response = await within(self._serve(self._service(peer), call), timeout_s, f"{call.method} of {call.uid}", name)
        header = decode_reply_header(response[0])
        if header is not None and header.error is not None:
            raise header.error.to_exception(peer=name, uid=call.uid)
        return Reply(header, response[1])

    async def close(self) -> None:
        """Nothing to close."""

    async def _serve(self, service: ExpertService, call: Call) -> tuple[bytes, list[torch.Tensor]]:
        encoded = [encode_tensor(tensor, codec) for tensor, codec in zip(call.tensors, call.codecs)]
        metadata = encode_header(call.header) if call.header is not None else b""
        try:
            wire = [message.SerializeToString() for message in stream_requests(call.uid, encoded, metadata)]
            messages = [ExpertRequest.FromString(data) for data in wire]
            admission = service.open(self.caller, call.method, call.uid, decode_request_header(messages[0].metadata))
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
