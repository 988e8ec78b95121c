"""The protobuf messages of stock hivemind 1.1.12. Owns: how a call, a reply and an expert's info look in them.

Both protocols ride in these messages: a stock peer leaves ``metadata`` empty, a native one puts its header there. Must not
know: sockets, and what the server does with a call. Chunking is hivemind's (``utils/streaming.py``): a part that has a
``dtype`` starts a new tensor, parts without one continue it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec
import torch
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from moe.errors import ProtocolError, SchemaError
from moe.schema import DTYPES, MAX_TENSORS, BatchTensorProto, Compression, ExpertSchema, Nested, TensorProto
from moe.wire.messages import MAX_DEPTH_INFO, MAX_INFO_BYTES, MAX_STOCK_BATCH, ExpertDescription, decode_description
from moe.wire.tensors import MAX_DIMENSIONS, EncodedTensor

ExpertRequest = runtime_pb2.ExpertRequest
ExpertResponse = runtime_pb2.ExpertResponse
ExpertUID = runtime_pb2.ExpertUID
ExpertInfo = runtime_pb2.ExpertInfo

SERVICE = "ConnectionHandler"  # stock handle names are "<servicer class>.<method>"
RPC_INFO, RPC_FORWARD, RPC_BACKWARD = f"{SERVICE}.rpc_info", f"{SERVICE}.rpc_forward", f"{SERVICE}.rpc_backward"
STREAM_SUFFIX = "_stream"
RPC_TICKET = "moe.rpc_ticket"  # ours: asks for a direct link; the answer rides in ``metadata``

CHUNK_BYTES = DEFAULT_MAX_MSG_SIZE  # hivemind.moe splits tensors into parts of 4 MiB
MAX_UNARY_BYTES = DEFAULT_MAX_MSG_SIZE // 2  # hivemind's limit for a unary payload, leaves room for the envelope
MAX_MESSAGE_BYTES = DEFAULT_MAX_MSG_SIZE + 2**20  # of one streamed message: a chunk, its envelope, and some slack
MAX_MESSAGE_PARTS = (
    2 * MAX_TENSORS
)  # fields of one message; each may be a tensor, and protobuf takes 200 bytes for an empty one
_MAX_PART_FIELDS = 2 * MAX_DIMENSIONS  # of one tensor in a message
_MAX_SIZE_BYTES = 10 * MAX_DIMENSIONS  # of the shape of a tensor in a message
MIN_PART_BYTES = 1024  # of each part of a tensor but the last: to read one takes as long as to copy 100 KiB
_TENSORS_FIELD, _SIZE_FIELD = 2, 2  # numbers in runtime.proto

_TUPLE_EXT, _DESCRIPTOR_EXT = 0x40, 0x51  # hivemind's MSGPackSerializer
_NATIVE_KEY = "moe"  # our description inside stock rpc_info; stock readers ignore it


# --- messages ----------------------------------------------------------------------------------------------------------


class Bounded:
    """A protobuf message type whose bytes are looked at before they are parsed.

    Parsed messages can be much larger than their bytes: two bytes are an empty tensor. So the parts of a message are counted
    first, without taking memory, and no further than a call can have. For requests and replies of experts.
    """

    def __init__(self, message_type: Any):
        self._type = message_type

    def FromString(self, data: bytes | bytearray) -> Any:
        """Parse a message.

        :raises ProtocolError: it is malformed, or of too many parts
        """
        _check_parts(memoryview(data))
        try:
            return self._type.FromString(data)
        except Exception as e:  # protobuf's DecodeError lives in different places in different versions
            raise ProtocolError(f"malformed message: {e}"[:300]) from None


def _check_parts(data: memoryview) -> None:
    for number, start, stop in _fields(data, 0, len(data), MAX_MESSAGE_PARTS):
        if number != _TENSORS_FIELD:
            continue
        for inner, begin, end in _fields(data, start, stop, _MAX_PART_FIELDS):
            if inner == _SIZE_FIELD and end - begin > _MAX_SIZE_BYTES:
                raise ProtocolError(f"a tensor of more than {MAX_DIMENSIONS} axes: its shape takes {end - begin} bytes")


def _fields(data: memoryview, at: int, stop: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each field in protobuf's wire format; those that are no bytes have no length.

    :raises ProtocolError: there are more than ``most``, or it is none
    """
    for _ in range(most):
        if at == stop:
            return
        key, at = _varint(data, at, stop)
        kind, begin = key & 7, at
        if kind == 0:
            _, at = _varint(data, at, stop)
            begin = at
        elif kind == 2:
            length, begin = _varint(data, at, stop)
            at = begin + length
        elif kind in (1, 5):
            begin = at = at + (8 if kind == 1 else 4)
        else:
            raise ProtocolError(f"malformed message: a field of wire type {kind}")
        if at > stop:
            raise ProtocolError("malformed message: a field is longer than what it is in")
        yield key >> 3, begin, at
    if at != stop:
        raise ProtocolError(f"a message of more than {most} parts")


def _varint(data: memoryview, at: int, stop: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ProtocolError("malformed message: a number without an end")


# --- tensors -----------------------------------------------------------------------------------------------------------


def to_message(encoded: EncodedTensor) -> Any:
    """Encoded tensor -> protobuf Tensor."""
    return runtime_pb2.Tensor(
        buffer=bytes(encoded.buffer), size=encoded.shape, dtype=encoded.dtype, compression=int(encoded.codec)
    )


def from_message(message: Any) -> EncodedTensor:
    """Protobuf Tensor -> encoded tensor.

    :raises ProtocolError: unknown codec, or no shape a tensor can have
    """
    return EncodedTensor(message.dtype, _shape(message), _codec(message), message.buffer)


def stream_parts(encoded: EncodedTensor) -> Iterator[Any]:
    """One tensor as protobuf Tensor parts of at most CHUNK_BYTES each; the first carries dtype, shape and codec."""
    view = memoryview(encoded.buffer)
    count = max(1, -(-len(view) // CHUNK_BYTES))
    yield runtime_pb2.Tensor(
        buffer=bytes(view[:CHUNK_BYTES]),
        size=encoded.shape,
        dtype=encoded.dtype,
        compression=int(encoded.codec),
        chunks=count,
    )
    for start in range(CHUNK_BYTES, len(view), CHUNK_BYTES):
        yield runtime_pb2.Tensor(buffer=bytes(view[start : start + CHUNK_BYTES]))


def stream_requests(uid: str, tensors: Sequence[EncodedTensor], metadata: bytes) -> Iterator[Any]:
    """A call as a stream of ExpertRequest; the first one carries the header, also when there are no tensors."""
    first = True
    for encoded in tensors:
        for part in stream_parts(encoded):
            yield ExpertRequest(uid=uid, tensors=[part], metadata=metadata if first else b"")
            first = False
    if first:
        yield ExpertRequest(uid=uid, metadata=metadata)


def stream_responses(tensors: Iterable[EncodedTensor], metadata: bytes) -> Iterator[Any]:
    """A reply as a stream of ExpertResponse; the first one carries the header."""
    first = True
    for encoded in tensors:
        for part in stream_parts(encoded):
            yield ExpertResponse(tensors=[part], metadata=metadata if first else b"")
            first = False
    if first:
        yield ExpertResponse(metadata=metadata)


class TensorGate(Protocol):
    """Decides whether a tensor may be received, from its declaration alone."""

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        """Most bytes tensor number ``index`` may have on the wire, or an error that refuses it."""
        ...


class TensorAssembler:
    """Puts streamed parts together. Takes no memory beyond what the gate admitted for the tensor at hand."""

    def __init__(self, gate: TensorGate):
        self._gate = gate
        self._done: list[EncodedTensor] = []
        self._head: tuple[str, tuple[int, ...], Compression] | None = None
        self._buffer = bytearray()
        self._limit = 0
        self._last_bytes = 0  # of the part before

    @property
    def missing_bytes(self) -> int:
        """What may still come of the tensor at hand."""
        return self._limit - len(self._buffer) if self._head is not None else 0

    def feed_all(self, parts: Iterable[Any]) -> None:
        """See feed."""
        for part in parts:
            self.feed(part)

    def feed(self, part: Any) -> None:
        """Take one protobuf Tensor part.

        :raises ProtocolError: a part that continues nothing, or more bytes than the tensor can have
        :raises SchemaError: (from the gate) a declared tensor that does not fit the schema
        """
        if part.dtype or self._head is None:
            if not part.dtype:
                raise ProtocolError("a tensor stream must begin with a part that says dtype and shape")
            self._finish_one()
            shape, codec = _shape(part), _codec(part)
            self._limit = self._gate.admit(len(self._done), shape, part.dtype, codec)
            self._head = (part.dtype, shape, codec)
        elif not part.buffer:
            raise ProtocolError(f"a part of tensor {len(self._done)} has nothing in it")
        if len(self._buffer) + len(part.buffer) > self._limit:
            raise ProtocolError(
                f"tensor {len(self._done)} sends more than the {self._limit} bytes that its declared shape allows"
            )
        if not part.dtype and self._last_bytes < MIN_PART_BYTES:
            raise ProtocolError(f"tensor {len(self._done)} comes in parts of fewer than {MIN_PART_BYTES} bytes")
        self._last_bytes = len(part.buffer)
        self._buffer += part.buffer

    def finish(self) -> list[EncodedTensor]:
        """All tensors, when the stream has ended."""
        self._finish_one()
        return self._done

    def _finish_one(self) -> None:
        if self._head is not None:
            dtype, shape, codec = self._head
            self._done.append(EncodedTensor(dtype, shape, codec, self._buffer))
            self._head, self._buffer = None, bytearray()


def _shape(message: Any) -> tuple[int, ...]:
    if len(message.size) > MAX_DIMENSIONS:
        raise ProtocolError(f"a tensor of {len(message.size)} axes; at most {MAX_DIMENSIONS} are allowed")
    return tuple(message.size)


def _codec(message: Any) -> Compression:
    try:
        return Compression(message.compression)
    except ValueError:
        raise ProtocolError(f"unknown tensor compression {message.compression}") from None


# --- rpc_info ------------------------------------------------------------------------------------------------------------


def stock_blockers(schema: ExpertSchema) -> list[str]:
    """What keeps a stock peer from calling an expert with this schema: global tensors it would have to send or read."""
    entries = [*schema.input_entries(()), *schema.output_entries]
    return [entry.path for entry in entries if not entry.proto.batched]


def encode_info(description: ExpertDescription) -> bytes:
    """What ``rpc_info`` answers: stock hivemind's keys for what it can express, and our description next to them.

    Optional kwargs are left out of the stock view, so stock clients call the expert without them. Where an expert cannot
    be called by a stock client at all, its ``keyword_names`` say so: the stock client's own check then fails, before
    sending, with that text.
    """
    schema = description.expert_schema()
    required = {name: schema.kwargs[name] for name in schema.required}
    blockers = stock_blockers(schema)
    names = schema.required
    if blockers:
        names = (f"<cannot be called by stock hivemind: {', '.join(blockers)} global; use the moe client>", *names)
    info: bytes = MSGPackSerializer.dumps(
        {
            "forward_schema": (_descriptors(schema.args), _descriptors(required)),
            "outputs_schema": _descriptors(schema.outputs),
            "keyword_names": names,
            _NATIVE_KEY: msgspec.msgpack.encode(description),
        }
    )
    return info


def decode_info(data: bytes) -> ExpertDescription:
    """Inverse of encode_info, for native and stock servers alike. Allows no other extension types than those two need.

    :raises ProtocolError: if the data describes no expert
    :raises Refused: of a native server of a higher major version
    """
    if len(data) > MAX_INFO_BYTES:
        raise ProtocolError(f"rpc_info of {len(data)} bytes, at most {MAX_INFO_BYTES} are allowed")
    try:
        info = _loads(data)
        if not isinstance(info, dict):
            raise ProtocolError(f"rpc_info: expected a dict, got {type(info).__name__}")
        native = info.get(_NATIVE_KEY)
        if native is not None:
            return decode_description(native)
        args, kwargs = info["forward_schema"]
        schema = ExpertSchema(args, {name: kwargs[name] for name in info["keyword_names"]}, info["outputs_schema"])
        return ExpertDescription(schema=schema.to_plain(), features=(), max_batch_size=MAX_STOCK_BATCH, native=False)
    except (msgspec.MsgspecError, SchemaError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise ProtocolError(f"rpc_info is malformed: {e!r:.300}") from e


def _descriptors(structure: Nested) -> Any:
    """Our protos as hivemind's descriptors; containers as they are."""
    if isinstance(structure, dict):
        return {key: _descriptors(value) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)(_descriptors(value) for value in structure)
    assert isinstance(structure, TensorProto)
    return BatchTensorDescriptor(
        *structure.sizes,
        dtype=structure.dtype,
        layout=torch.strided,
        device=torch.device("cpu"),
        compression=int(structure.compression),
    )


def _loads(data: bytes | memoryview, depth: int = 0) -> Any:
    if depth > MAX_DEPTH_INFO:
        raise ProtocolError("rpc_info: nested too deep")

    def ext_hook(code: int, payload: memoryview) -> Any:
        inner = _loads(payload, depth + 1) if code in (_TUPLE_EXT, _DESCRIPTOR_EXT) else None
        if code == _TUPLE_EXT and isinstance(inner, list):
            return tuple(inner)
        if code == _DESCRIPTOR_EXT and isinstance(inner, dict):
            return _proto(inner)
        raise ProtocolError(f"rpc_info: extension type {code:#x} is not allowed")

    return msgspec.msgpack.decode(data, ext_hook=ext_hook)


def _proto(plain: dict[str, Any]) -> BatchTensorProto:
    dtype = plain["dtype"]
    return BatchTensorProto(
        *plain["size"][1:],
        dtype=None if dtype is None else DTYPES[str(dtype).removeprefix("torch.")],
        compression=plain["compression"],
    )
