"""The frame parser: the same calls whatever the sizes in which bytes arrive, and nothing but ProtocolError for garbage."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ProtocolError
from moe.wire.frames import (
    CANCEL,
    DATA,
    HEADER,
    HELLO,
    MAX_CHUNK_BYTES,
    OPEN,
    Frame,
    FrameParser,
    Opening,
    TensorHead,
    decode_opening,
    encode_frame,
    encode_opening,
)

ALLOWED = frozenset((OPEN, DATA, CANCEL))


class Sink:
    """Takes what calls announce, as a link does: memory per call, in order."""

    def __init__(self, sizes: dict[int, int]):
        self.memory = {call: bytearray(size) for call, size in sizes.items()}
        self.filled_bytes = dict.fromkeys(sizes, 0)

    def room_for(self, call: int, length: int) -> memoryview:
        memory = self.memory.get(call)
        if memory is None or self.filled_bytes[call] == len(memory):
            raise ProtocolError(f"call {call} expects nothing")
        start = self.filled_bytes[call]
        return memoryview(memory)[start : start + length]

    def filled(self, call: int, length: int) -> None:
        self.filled_bytes[call] += length


def feed(parser: FrameParser, data: bytes, sizes: "itertools.cycle[int]") -> None:
    view = memoryview(data)
    while len(view):
        room = parser.buffer()
        assert len(room) > 0
        count = min(len(room), len(view), next(sizes))
        room[:count] = view[:count]
        parser.advance(count)
        view = view[count:]


def chunks(call: int, data: bytes, size: int) -> bytes:
    return b"".join(encode_frame(DATA, call, data[i : i + size]) for i in range(0, len(data), size))


@given(
    sizes=st.lists(st.integers(1, 70_000), min_size=1, max_size=5),
    chunk=st.integers(1, 50_000),
    lengths=st.lists(st.integers(1, 120_000), min_size=1, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_interleaved_calls_arrive_whole_however_the_stream_is_cut(
    sizes: list[int], chunk: int, lengths: list[int]
) -> None:
    chunk = max(chunk, max(lengths) // 50)
    contents = {call: bytes(i * call % 251 for i in range(length)) for call, length in enumerate(lengths, 1)}
    opening = Opening("forward", "ffn.0.0", b"header", (TensorHead("float32", (3, 4), 0, 48),))
    pieces = [
        [encode_frame(DATA, call, data[i : i + chunk]) for i in range(0, len(data), chunk)]
        for call, data in contents.items()
    ]
    stream = encode_frame(OPEN, 9, encode_opening(opening))
    stream += b"".join(piece for turn in itertools.zip_longest(*pieces, fillvalue=b"") for piece in turn)
    stream += encode_frame(CANCEL, 7)
    frames: list[Frame] = []
    sink = Sink({call: len(data) for call, data in contents.items()})
    feed(FrameParser(frames.append, sink, ALLOWED), stream, itertools.cycle(sizes))
    assert [(frame.kind, frame.call) for frame in frames] == [(OPEN, 9), (CANCEL, 7)]
    assert decode_opening(frames[0].payload) == opening
    assert {call: bytes(memory) for call, memory in sink.memory.items()} == contents


def test_large_payload_is_read_right_into_its_tensor() -> None:
    sink = Sink({1: 500_000})
    parser = FrameParser(lambda frame: None, sink, ALLOWED)
    feed(parser, HEADER.pack(DATA, 1, 500_000) + bytes(10), itertools.cycle([100]))
    room = parser.buffer()
    assert len(room) == 500_000 - 10
    assert room.obj is sink.memory[1]


@pytest.mark.parametrize(
    "stream",
    [
        encode_frame(HELLO, 0, bytes(32)),  # not in an established link
        encode_frame(99, 0),
        HEADER.pack(DATA, 1, MAX_CHUNK_BYTES + 1),
        HEADER.pack(OPEN, 1, 2**60),
        HEADER.pack(CANCEL, 1, 1),
        encode_frame(DATA, 5, b"for a call that expects nothing"),
        encode_frame(DATA, 1, bytes(101)),  # more than the call announced
    ],
    ids=[
        "hello",
        "unknown type",
        "chunk too long",
        "opening too long",
        "cancel with payload",
        "no such call",
        "too much",
    ],
)
def test_broken_streams_are_refused(stream: bytes) -> None:
    parser = FrameParser(lambda frame: None, Sink({1: 100}), ALLOWED)
    with pytest.raises(ProtocolError):
        feed(parser, stream, itertools.cycle([1000]))


@given(garbage=st.binary(min_size=1, max_size=3000), size=st.integers(1, 3000))
def test_garbage_is_a_protocol_error_or_an_unfinished_frame(garbage: bytes, size: int) -> None:
    openings: list[Opening] = []
    parser = FrameParser(lambda frame: openings.append(decode_opening(frame.payload)), Sink({1: 100}), ALLOWED)
    try:
        feed(parser, garbage, itertools.cycle([size]))
    except ProtocolError:
        return


@given(garbage=st.binary(max_size=500))
def test_garbage_openings(garbage: bytes) -> None:
    try:
        decode_opening(garbage)
    except ProtocolError:
        return


@pytest.mark.parametrize(
    "head", [("float32", (-1,), 0, 4), ("float32", (1,), 99, 4), ("float32", (1,), 0, -4), ("f" * 99, (1,), 0, 4)]
)
def test_impossible_tensor_heads_are_refused(head: tuple[str, tuple[int, ...], int, int]) -> None:
    import msgspec

    with pytest.raises(ProtocolError):
        decode_opening(msgspec.msgpack.encode(["forward", "ffn.0", b"", [list(head)]]))
