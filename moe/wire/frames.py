"""Frames of the direct link. Owns: their layout, their bounds, and a parser that says where the next bytes belong.

No sockets: ``FrameParser`` hands out memory to read into and is told how much arrived, so that tensors land in their final
buffers without a copy, and so that it can be fuzzed. Must not know: who is on the other side, or what a call means.

A frame is a 16-byte header, ``type (1), padding (3), call (4), length (8)``, all big-endian, and ``length`` bytes of payload:

=========  ==========================================================  =================================
type       payload                                                     meaning
=========  ==========================================================  =================================
HELLO      32 bytes                                                    the secret of a ticket
WELCOME    32 bytes                                                    the server's proof that it made it
OPEN       MessagePack ``Opening``                                     a request, or a reply, begins
DATA       at most 1 MiB of the tensors announced by the call's OPEN   in order, without gaps
CANCEL     none                                                        nobody waits for this call any more
=========  ==========================================================  =================================
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Annotated, NamedTuple, Protocol

import msgspec

from moe.errors import ProtocolError
from moe.schema import MAX_TENSORS, Compression
from moe.wire.messages import MAX_HEADER_BYTES, Name
from moe.wire.tensors import MAX_DIMENSIONS, EncodedTensor

HELLO, WELCOME, OPEN, DATA, CANCEL = 1, 2, 3, 4, 5
HEADER = struct.Struct("!BxxxIQ")
HEADER_BYTES = HEADER.size

MAX_CHUNK_BYTES = 2**20  # of one DATA frame: other calls get their turn in between
MAX_OPENING_BYTES = 2 * MAX_HEADER_BYTES + 64 * MAX_TENSORS  # a reply or request header, and all tensor heads
SECRET_BYTES = 32

_MAX_PAYLOAD = {
    HELLO: SECRET_BYTES,
    WELCOME: SECRET_BYTES,
    OPEN: MAX_OPENING_BYTES,
    DATA: MAX_CHUNK_BYTES,
    CANCEL: 0,
}
_STAGING_BYTES = 2**16  # small frames are read many at a time into a buffer of this size
_DIRECT_BYTES = 2**14  # payload of at least this size is read right into its tensor


class TensorHead(msgspec.Struct, array_like=True, frozen=True):
    """What precedes a tensor's bytes."""

    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=2**62)], ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    codec: Annotated[int, msgspec.Meta(ge=0, le=int(max(Compression)))]
    size_bytes: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]

    @classmethod
    def of(cls, tensor: EncodedTensor) -> TensorHead:
        """The head of an encoded tensor."""
        return cls(tensor.dtype, tensor.shape, int(tensor.codec), len(tensor.buffer))


class Opening(msgspec.Struct, array_like=True, frozen=True):
    """The beginning of a request (method and uid set) or of a reply (both empty)."""

    method: Name
    uid: Annotated[str, msgspec.Meta(max_length=64 * 1024)]
    header: Annotated[bytes, msgspec.Meta(max_length=MAX_HEADER_BYTES)]
    tensors: Annotated[tuple[TensorHead, ...], msgspec.Meta(max_length=MAX_TENSORS)]


_encoder = msgspec.msgpack.Encoder()
_opening_decoder = msgspec.msgpack.Decoder(Opening)


def encode_frame(kind: int, call: int, payload: bytes = b"") -> bytes:
    """A whole small frame."""
    return HEADER.pack(kind, call, len(payload)) + payload


def encode_opening(opening: Opening) -> bytes:
    """The payload of an OPEN frame.

    :raises ProtocolError: too large to be sent
    """
    data = _encoder.encode(opening)
    if len(data) > MAX_OPENING_BYTES:
        raise ProtocolError(f"a call's opening of {len(data)} bytes, at most {MAX_OPENING_BYTES} can be sent")
    return data


def decode_opening(payload: bytes | bytearray | memoryview) -> Opening:
    """Inverse of encode_opening.

    :raises ProtocolError: anything else
    """
    try:
        return _opening_decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ProtocolError(f"malformed opening of a call: {e}"[:500]) from None


class Frame(NamedTuple):
    """A whole frame other than DATA."""

    kind: int
    call: int
    payload: bytes


class DataSink(Protocol):
    """Takes the bytes of calls' tensors."""

    def room_for(self, call: int, length: int) -> memoryview:
        """Where the next bytes of a call go: at most ``length`` bytes, at least one.

        :raises ProtocolError: the call does not expect as many
        """
        ...

    def filled(self, call: int, length: int) -> None:
        """This many bytes were put into the room given last for the call."""
        ...


class FrameParser:
    """Turns a byte stream into frames and filled tensors.

    :param on_frame: called with every frame but DATA
    :param sink: gets the payload of DATA frames
    :param allowed: frame types that are expected now; changed by the owner as a handshake goes on
    :param goes_on: asked between two frames that have both been read; False: stop there
    :ivar stopped: nothing more is parsed for now; any of the callbacks may say so, too
    :ivar frames: begun so far

    Use: ``n = socket.recv_into(parser.buffer())``, then ``parser.advance(n)``; once stopped, first ``parser.go_on()``. What
    these raise is final for the stream.
    """

    def __init__(
        self,
        on_frame: Callable[[Frame], None],
        sink: DataSink,
        allowed: frozenset[int],
        goes_on: Callable[[], bool] = lambda: True,
    ):
        self.allowed = allowed
        self._goes_on = goes_on
        self.stopped = False
        self.frames = 0
        self._on_frame, self._sink = on_frame, sink
        self._staging = bytearray(_STAGING_BYTES)
        self._view = memoryview(self._staging)
        self._begin = self._end = 0  # unparsed bytes in staging
        self._payload = bytearray()  # of a frame longer than what has been read of it
        self._head: tuple[int, int] | None = None  # kind and call of the frame being read
        self._left = 0  # payload bytes of it still to come
        self._direct = False  # the last buffer() was a tensor's own memory

    @property
    def unfinished(self) -> bool:
        """True in the middle of a frame, but for the bytes of tensors."""
        return self._begin < self._end if self._head is None else self._head[0] != DATA

    def buffer(self) -> memoryview:
        """Where to read the next bytes of the stream into; never empty."""
        assert not self.stopped
        kind = self._head[0] if self._head is not None else None
        self._direct = kind == DATA and self._begin == self._end and self._left >= _DIRECT_BYTES
        if self._direct:
            assert self._head is not None
            return self._sink.room_for(self._head[1], self._left)
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._end == len(self._staging):
            rest = self._staging[self._begin : self._end]
            self._staging[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
        return self._view[self._end :]

    def advance(self, count: int) -> None:
        """``count`` bytes were read into the last buffer.

        :raises ProtocolError: the stream is not ours
        """
        if self._direct:
            assert self._head is not None
            call = self._head[1]
            self._left -= count
            if self._left == 0:
                self._head = None
            self._sink.filled(call, count)
            return
        self._end += count
        self._parse()

    def go_on(self) -> None:
        """Parse what was left when the parser was stopped.

        :raises ProtocolError: the stream is not ours
        """
        if self.stopped:
            self.stopped = False
            self._parse()

    def _parse(self) -> None:
        first = True
        while not self.stopped:
            available = self._end - self._begin
            if available < (HEADER_BYTES if self._head is None else 1):
                return
            if self._head is None:
                if not first and not self._goes_on():
                    self.stopped = True
                    return
                first = False
                kind, call, length = HEADER.unpack_from(self._staging, self._begin)
                self._check_frame(kind, length)
                self.frames += 1
                self._begin += HEADER_BYTES
                available -= HEADER_BYTES
                if length <= available and kind != DATA:  # all of it is here, as nearly always
                    self._begin += length
                    self._on_frame(Frame(kind, call, bytes(self._view[self._begin - length : self._begin])))
                    continue
                self._head, self._left = (kind, call), length
            self._take(available)

    def _take(self, available: int) -> None:
        """Take what there is of the frame at hand out of staging."""
        assert self._head is not None
        kind, call = self._head
        count = min(available, self._left)
        if kind != DATA:
            self._payload += self._view[self._begin : self._begin + count]
        elif count:
            room = self._sink.room_for(call, count)
            count = len(room)
            room[:] = self._view[self._begin : self._begin + count]
        self._begin += count
        self._left -= count
        if self._left == 0:
            self._head = None
        if kind == DATA:
            if count:
                self._sink.filled(call, count)
        elif self._left == 0:
            payload, self._payload = bytes(self._payload), bytearray()
            self._on_frame(Frame(kind, call, payload))

    def _check_frame(self, kind: int, length: int) -> None:
        if kind not in self.allowed:
            raise ProtocolError(f"a frame of type {kind}, expected one of {sorted(self.allowed)}")
        if length > _MAX_PAYLOAD[kind]:
            raise ProtocolError(f"a frame of type {kind} with {length} bytes, at most {_MAX_PAYLOAD[kind]} are allowed")
        if length == 0 and kind == DATA:
            raise ProtocolError("a frame of no bytes of a tensor")
