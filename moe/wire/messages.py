"""Typed headers of the native protocol. Owns: their fields, their version, and refusing what does not fit.

A header rides in the ``metadata`` field of hivemind's expert messages (or in a frame of the direct link). Stock hivemind
leaves that field empty, which is how its peers are recognized. Every field is sent, defaults too: what is a default now
need not be one in the next version. Unknown keys are ignored, a higher major version is refused by name. MessagePack by
msgspec, decoded into structs that reject anything else; no pickle, ever.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

import msgspec

from moe.errors import MAX_MESSAGE_CHARS, ConfigError, MoEError, ProtocolError, Refused, error_from_wire
from moe.schema import DIGEST_BYTES, ExpertSchema

PROTOCOL_MAJOR, PROTOCOL_MINOR = 1, 1
HELD_TENSORS = "held_tensors"
FEATURES = ("global_kwargs", "optional_kwargs", "gradient_mask", "once", "deadline", "chain", HELD_TENSORS)
MAX_HEADER_BYTES = 64 * 1024  # ours; a header with 4096 tensors is about 8 KiB
MAX_INFO_BYTES = 4 * 1024 * 1024  # one unary message of hivemind's P2P
MAX_DEPTH_INFO = 24  # nesting of rpc_info
MAX_STOCK_BATCH = 2**31 - 1  # stock servers do not tell their max_batch_size
REQUEST_ID_BYTES = 16
MIN_HELD_BYTES = 4096  # smaller tensors are always sent: to look one up costs about as much
MAX_HELD = 512  # tensors of one request that are not sent; ours, their keys take a quarter of a header
MAX_CHAIN_BLOCKS = 256  # run for one request; ours, bounds how much work a small request can ask for
MAX_ERROR_CHARS = MAX_MESSAGE_CHARS

RequestId = Annotated[bytes, msgspec.Meta(min_length=REQUEST_ID_BYTES, max_length=REQUEST_ID_BYTES)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Position = Annotated[int, msgspec.Meta(ge=0, lt=4096)]
HeldKey = Annotated[bytes, msgspec.Meta(min_length=REQUEST_ID_BYTES, max_length=DIGEST_BYTES)]

Metadata = Annotated[dict[Name, str | int | float | bool | None], msgspec.Meta(max_length=64)]
MAX_METADATA_BYTES = 4096  # encoded; ours


class BlockInputs(msgspec.Struct, kw_only=True, frozen=True):
    """What one block of a chain is given, besides what the block before it returns. See moe.chains.

    :ivar present: names of the optional kwargs given to this block
    :ivar tensors: positions, among the request's tensors, of the leaves of its kwargs, in its schema's order
    :ivar request_id: backward only: 16 random bytes; a repeat with the same id never trains this block twice
    """

    present: Annotated[tuple[Name, ...], msgspec.Meta(max_length=4096)] = ()
    tensors: Annotated[tuple[Position, ...], msgspec.Meta(max_length=4096)] = ()
    request_id: RequestId | None = None


class RequestHeader(msgspec.Struct, kw_only=True, frozen=True):
    """What a native client says about a call besides the tensors.

    :ivar major: protocol major version; a server refuses a higher one than it speaks
    :ivar minor: protocol minor version; informative
    :ivar features: names of protocol features the sender knows
    :ivar request_id: 16 random bytes; a repeated backward with the same id never trains twice
    :ivar time_left_s: seconds until the caller gives up; None: the server's own limit
    :ivar present: names of the optional kwargs in this call
    :ivar wants_grad: backward only: which flat inputs want their gradient sent back; None: all floating-point ones
    :ivar chain: one for each of the uids of the request; None: its uid is that of a single expert
    :ivar held: positions of inputs that are not sent, because the server holds them, and their keys: the digest of a global
        one, or the request id of the forward that an input came with
    :ivar hold: positions of global tensors that the server shall hold by their digests
    :ivar keep: forward only: hold all inputs that are sent under ``request_id``, for the backward that follows
    :ivar metadata: whatever caller and server have agreed on; given to the server's ``authorize``
    """

    major: int = PROTOCOL_MAJOR
    minor: int = PROTOCOL_MINOR
    features: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = FEATURES
    request_id: RequestId | None = None
    time_left_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    present: Annotated[tuple[Name, ...], msgspec.Meta(max_length=4096)] = ()
    wants_grad: Annotated[tuple[bool, ...], msgspec.Meta(max_length=4096)] | None = None
    chain: Annotated[tuple[BlockInputs, ...], msgspec.Meta(min_length=1, max_length=MAX_CHAIN_BLOCKS)] | None = None
    held: Annotated[dict[Position, HeldKey], msgspec.Meta(max_length=MAX_HELD)] = {}
    hold: Annotated[tuple[Position, ...], msgspec.Meta(max_length=MAX_HELD)] = ()
    keep: bool = False
    metadata: Metadata = {}


class WireError(msgspec.Struct, omit_defaults=True, kw_only=True, frozen=True):
    """An error as it travels: a stable code and a message without paths or tracebacks."""

    code: Name
    message: Annotated[str, msgspec.Meta(max_length=MAX_ERROR_CHARS)]

    @classmethod
    def from_exception(cls, error: MoEError) -> WireError:
        """The wire form of one of our errors."""
        message = (
            error.message[:MAX_ERROR_CHARS].encode("utf-8", "replace").decode()
        )  # a module may say what is no text
        return cls(code=error.code, message=message)

    def to_exception(self, *, peer: str | None, uid: str | None) -> MoEError:
        """The error to raise on this side; see ``error_from_wire``."""
        return error_from_wire(self.code, self.message, peer=peer, uid=uid)


class ReplyHeader(msgspec.Struct, kw_only=True, frozen=True):
    """What a server says about a reply besides the tensors.

    :ivar error: set instead of tensors
    :ivar has_grad: backward only: which flat inputs have a gradient among the tensors that follow
    :ivar queue_s: time the task waited for its batch
    :ivar compute_s: time its batch took
    """

    major: int = PROTOCOL_MAJOR
    error: WireError | None = None
    has_grad: Annotated[tuple[bool, ...], msgspec.Meta(max_length=4096)] | None = None
    queue_s: float = 0.0
    compute_s: float = 0.0


class ExpertDescription(msgspec.Struct, kw_only=True, frozen=True):
    """What a native server tells about an expert in ``rpc_info``, next to stock hivemind's keys.

    :ivar schema: ``ExpertSchema.to_plain()``
    :ivar max_batch_size: rows a single request may have; clients split larger ones
    :ivar max_request_bytes: tensors of a single request together
    :ivar trainable: False if the expert has no optimizer
    """

    major: int = PROTOCOL_MAJOR
    minor: int = PROTOCOL_MINOR
    features: tuple[Name, ...] = FEATURES
    schema: dict[str, Any]
    max_batch_size: Annotated[int, msgspec.Meta(gt=0)]
    max_request_bytes: Annotated[int, msgspec.Meta(gt=0)] = 2**30
    trainable: bool = True
    native: bool = True

    def expert_schema(self) -> ExpertSchema:
        """The schema, checked.

        :raises ProtocolError: if it is malformed
        """
        return ExpertSchema.from_plain(self.schema)


_request_decoder = msgspec.msgpack.Decoder(RequestHeader)
_reply_decoder = msgspec.msgpack.Decoder(ReplyHeader)
_description_decoder = msgspec.msgpack.Decoder(ExpertDescription)
_encoder = msgspec.msgpack.Encoder()


def check_metadata(metadata: Any) -> Metadata:
    """What a caller tells servers besides, if it can be sent.

    :raises ConfigError: it is no mapping of names to plain values, or too large
    """
    try:
        checked: Metadata = msgspec.convert(dict(metadata), Metadata)
        size = len(_encoder.encode(checked))
    except (TypeError, ValueError, OverflowError) as e:
        raise ConfigError(f"request_metadata: expected names with str, int, float, bool or None: {e}") from None
    if size > MAX_METADATA_BYTES:
        raise ConfigError(f"request_metadata: {size} bytes, at most {MAX_METADATA_BYTES} can be sent")
    return checked


def new_request_id() -> bytes:
    """16 random bytes from the operating system."""
    return secrets.token_bytes(REQUEST_ID_BYTES)


def encode_header(header: RequestHeader | ReplyHeader) -> bytes:
    """Header -> MessagePack. Never empty, so that it can be told from a stock peer's absent one."""
    return _encoder.encode(header)


def decode_request_header(data: bytes) -> RequestHeader | None:
    """The header of a request, or None from a stock hivemind client (empty metadata).

    :raises ProtocolError: not MessagePack, or a field of another type than ours
    :raises Refused: of a higher major version
    """
    if not data:
        return None
    header: RequestHeader = _checked(_request_decoder, data, "request header")
    return header


def decode_reply_header(data: bytes) -> ReplyHeader | None:
    """The header of a reply, or None from a stock hivemind server.

    :raises ProtocolError: not MessagePack, or a field of another type than ours
    :raises Refused: of a higher major version
    """
    if not data:
        return None
    header: ReplyHeader = _checked(_reply_decoder, data, "reply header")
    return header


def decode_description(data: bytes) -> ExpertDescription:
    """What a native server tells about an expert.

    :raises ProtocolError: not MessagePack, or a field of another type than ours
    :raises Refused: of a higher major version
    """
    description: ExpertDescription = _checked(_description_decoder, data, "description", MAX_INFO_BYTES)
    return description


def _checked(decoder: Any, data: bytes, what: str, max_bytes: int = MAX_HEADER_BYTES) -> Any:
    if len(data) > max_bytes:
        raise ProtocolError(f"metadata: {what} of {len(data)} bytes, at most {max_bytes} are allowed")
    try:
        header = decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        major = _peek_major(data)
        if major is None or major <= PROTOCOL_MAJOR:
            raise ProtocolError(f"metadata: malformed {what}: {e}"[:MAX_ERROR_CHARS]) from None
        raise Refused(f"{what} of protocol version {major}, this side speaks up to {PROTOCOL_MAJOR}") from None
    if header.major > PROTOCOL_MAJOR:
        raise Refused(f"{what} of protocol version {header.major}, this side speaks up to {PROTOCOL_MAJOR}")
    return header


class _VersionOnly(msgspec.Struct):
    major: int = 0


def _peek_major(data: bytes) -> int | None:
    """The major version of a header whose other fields may have changed meaning, if it has one."""
    try:
        return msgspec.msgpack.decode(data, type=_VersionOnly).major
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
