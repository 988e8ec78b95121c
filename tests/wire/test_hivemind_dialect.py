"""The messages of stock hivemind: what we write it reads, what it writes we read, and parts that lie are refused."""

from __future__ import annotations

import time
from typing import Any

import hivemind
import msgspec
import pytest
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import split_for_streaming
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ProtocolError, Refused, SchemaError
from moe.schema import BatchTensorProto, Compression, ExpertSchema, TensorProto
from moe.wire import hivemind_dialect as dialect
from moe.wire.messages import MAX_INFO_BYTES, MAX_STOCK_BATCH, ExpertDescription
from moe.wire.tensors import EncodedTensor, decode_tensor, encode_tensor
from tests.test_schema import schemas

B = BatchTensorProto


class Gate:
    """Admits anything up to a bound; remembers what was declared."""

    def __init__(self, limit: int = 2**40):
        self.limit, self.declared = limit, list[tuple[int, tuple[int, ...], str, Compression]]()

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        self.declared.append((index, shape, dtype, codec))
        return self.limit


def assemble(parts: Any, gate: Gate | None = None) -> list[torch.Tensor]:
    assembler = dialect.TensorAssembler(gate or Gate())
    for part in parts:
        assembler.feed(runtime_pb2.Tensor.FromString(part.SerializeToString()))
    return [decode_tensor(encoded) for encoded in assembler.finish()]


# --- tensors -------------------------------------------------------------------------------------------------------------

TENSORS = [
    torch.randn(3, 4),
    torch.randn(()),
    torch.zeros(0, 3),
    torch.arange(5),
    torch.tensor([True, False]),
    torch.randn(2, 3).half(),
    torch.randn(2, 3).double(),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}{tuple(t.shape)}")
def test_stock_reads_our_tensors_and_we_read_stocks(tensor: torch.Tensor) -> None:
    ours = runtime_pb2.Tensor.FromString(dialect.to_message(encode_tensor(tensor)).SerializeToString())
    restored = deserialize_torch_tensor(ours)
    assert restored.dtype == tensor.dtype
    assert torch.equal(restored, tensor)
    stocks = runtime_pb2.Tensor.FromString(serialize_torch_tensor(tensor).SerializeToString())
    assert torch.equal(decode_tensor(dialect.from_message(stocks)), tensor)


@pytest.mark.parametrize("values", [1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_large_tensors_are_streamed_in_the_parts_that_stock_makes(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "CHUNK_BYTES", 2**20)
    tensor = torch.arange(values, dtype=torch.float32)
    ours = list(dialect.stream_parts(encode_tensor(tensor)))
    stocks = list(split_for_streaming(serialize_torch_tensor(tensor), 2**20))
    assert [len(part.buffer) for part in ours] == [len(part.buffer) for part in stocks]
    assert [part.chunks for part in ours] == [part.chunks for part in stocks]
    for parts in (ours, stocks):
        assert torch.equal(assemble(parts)[0], tensor)


def test_several_tensors_share_a_stream_and_the_header_comes_first() -> None:
    tensors = [torch.randn(4), torch.zeros(0), torch.randn(2, 2)]
    encoded = [encode_tensor(tensor) for tensor in tensors]
    requests = list(dialect.stream_requests("e.0", encoded, b"header"))
    assert [request.uid for request in requests] == ["e.0"] * 3
    assert [request.metadata for request in requests] == [b"header", b"", b""]
    responses = list(dialect.stream_responses(encoded, b"header"))
    assert [response.metadata for response in responses] == [b"header", b"", b""]
    gate = Gate()
    received = assemble([part for message in responses for part in message.tensors], gate)
    assert all(torch.equal(a, b) for a, b in zip(received, tensors, strict=True))
    assert gate.declared == [
        (0, (4,), "float32", Compression.NONE),
        (1, (0,), "float32", Compression.NONE),
        (2, (2, 2), "float32", Compression.NONE),
    ]


def test_a_call_without_tensors_is_still_a_message() -> None:
    (request,) = dialect.stream_requests("e.0", [], b"header")
    (response,) = dialect.stream_responses([], b"header")
    assert (request.uid, request.metadata, response.metadata) == ("e.0", b"header", b"header")
    assert assemble([]) == []


def test_streams_that_lie_are_refused_before_memory_is_taken() -> None:
    part = runtime_pb2.Tensor
    with pytest.raises(ProtocolError, match="must begin"):
        assemble([part(buffer=b"1234")])
    with pytest.raises(ProtocolError, match="more than the 6 bytes"):
        assemble([part(dtype="float32", size=[2], buffer=b"1234"), part(buffer=b"5678")], Gate(6))
    with pytest.raises(ProtocolError, match="tensor 1 sends more"):
        assemble([part(dtype="float32", size=[1], buffer=b"1234")] * 2 + [part(buffer=b"5678")], Gate(4))
    with pytest.raises(ProtocolError, match="parts of fewer than 1024 bytes"):
        assemble(
            [part(dtype="float32", size=[3], buffer=b"1234"), part(buffer=b"5678"), part(buffer=b"90ab")], Gate(12)
        )
    with pytest.raises(ProtocolError, match="compression 99"):
        assemble([part(dtype="float32", size=[1], compression=99)])
    with pytest.raises(ProtocolError, match="compression 99"):
        dialect.from_message(part(dtype="float32", size=[1], compression=99))

    class Refusing(Gate):
        def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
            raise SchemaError("too large")

    assembler = dialect.TensorAssembler(Refusing())
    with pytest.raises(SchemaError, match="too large"):
        assembler.feed(part(dtype="float32", size=[10**9], buffer=bytes(100)))
    assert len(assembler._buffer) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "", "bool", "x"]),
            st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), max_size=2),
            st.binary(max_size=9),
        ),
        max_size=5,
    )
)
def test_any_stream_is_tensors_or_a_typed_error(parts: list[tuple[str, list[int], bytes]]) -> None:
    messages = [runtime_pb2.Tensor(dtype=dtype, size=size, buffer=buffer) for dtype, size, buffer in parts]
    try:
        assemble(messages, Gate(12))
    except ProtocolError:
        return


# --- rpc_info ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(schemas())
def test_any_schema_travels_in_rpc_info(schema: ExpertSchema) -> None:
    description = ExpertDescription(schema=schema.to_plain(), max_batch_size=7, max_request_bytes=99, trainable=False)
    assert dialect.decode_info(dialect.encode_info(description)) == description
    stock = MSGPackSerializer.loads(dialect.encode_info(description))  # stock must be able to read any of them
    assert set(stock) >= {"forward_schema", "outputs_schema", "keyword_names"}


def test_stock_sees_the_batched_part_of_an_expert() -> None:
    schema = ExpertSchema(
        (B(None, 4), (B(dtype=torch.int64), [B(2, compression=Compression.FLOAT16)])),
        {"mask": B(3, dtype=torch.bool), "lora": TensorProto(4, 4)},
        {"y": B(4)},
        optional=("lora",),
    )
    info = MSGPackSerializer.loads(dialect.encode_info(ExpertDescription(schema=schema.to_plain(), max_batch_size=7)))
    args, kwargs = info["forward_schema"]
    assert args[0].size == (None, None, 4)
    assert args[1][1][0].compression == hivemind.proto.runtime_pb2.CompressionType.FLOAT16
    assert isinstance(args[1][1], list)
    assert list(kwargs) == list(info["keyword_names"]) == ["mask"]
    assert kwargs["mask"].dtype == torch.bool
    assert info["outputs_schema"]["y"].make_zeros(2).shape == (2, 4)
    assert dialect.stock_blockers(schema) == []


def test_an_expert_that_stock_cannot_call_tells_so_through_its_keyword_names() -> None:
    schema = ExpertSchema((B(2),), {"lora": TensorProto(4, 4)}, (B(2), TensorProto()))
    assert dialect.stock_blockers(schema) == ["kwargs['lora']", "outputs[1]"]
    info = MSGPackSerializer.loads(dialect.encode_info(ExpertDescription(schema=schema.to_plain(), max_batch_size=7)))
    assert "cannot be called by stock hivemind" in info["keyword_names"][0]
    assert "kwargs['lora'], outputs[1]" in info["keyword_names"][0]


def stock_info(**changes: Any) -> bytes:
    descriptor = BatchTensorDescriptor(4)
    info = {
        "forward_schema": ((descriptor,), {"mask": BatchTensorDescriptor(dtype=torch.bool)}),
        "outputs_schema": descriptor,
        "keyword_names": ("mask",),
    }
    data: bytes = MSGPackSerializer.dumps({**info, **changes})
    return data


def test_what_a_stock_server_says_is_understood() -> None:
    description = dialect.decode_info(stock_info())
    assert not description.native
    assert description.features == ()
    assert description.max_batch_size == MAX_STOCK_BATCH
    assert description.expert_schema() == ExpertSchema((B(4),), {"mask": B(dtype=torch.bool)}, B(4))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x80",
        b"\x91" * 60_000,
        bytes(MAX_INFO_BYTES + 1),
        stock_info(forward_schema=5),
        stock_info(forward_schema=((), {})),
        stock_info(forward_schema=(("text",), {})),
        stock_info(keyword_names=("other",)),
        stock_info(keyword_names=7),
        stock_info(keyword_names=("not a name",)),
        stock_info(outputs_schema=[3]),
        stock_info(moe=5),
        stock_info(moe=b"\xc1"),
        stock_info(moe=msgspec.msgpack.encode({"schema": {}, "max_batch_size": 0})),
        msgspec.msgpack.encode({"x": msgspec.msgpack.Ext(0x51, b"\xc1")}),
        msgspec.msgpack.encode({"x": msgspec.msgpack.Ext(0x51, msgspec.msgpack.encode({}))}),
        msgspec.msgpack.encode({"x": msgspec.msgpack.Ext(0x51, msgspec.msgpack.encode({"dtype": "torch.load"}))}),
        msgspec.msgpack.encode({"x": msgspec.msgpack.Ext(0x40, msgspec.msgpack.encode({}))}),
        msgspec.msgpack.encode({"x": msgspec.msgpack.Ext(0x52, b"")}),
    ],
    ids=lambda data: repr(data[:30]),
)
def test_rpc_info_that_describes_no_expert_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        dialect.decode_info(data)


def test_extensions_nested_without_end_are_refused() -> None:
    data = b"\x90"
    for _ in range(40):
        data = msgspec.msgpack.encode(msgspec.msgpack.Ext(0x40, msgspec.msgpack.encode([msgspec.Raw(data)])))
    with pytest.raises(ProtocolError):
        dialect.decode_info(msgspec.msgpack.encode({"x": msgspec.Raw(data)}))


def test_an_expert_of_a_higher_major_version_is_refused_by_name() -> None:
    schema = ExpertSchema((B(2),), outputs=B(2)).to_plain()
    for native in (
        msgspec.msgpack.encode(ExpertDescription(major=2, schema=schema, max_batch_size=1)),
        msgspec.msgpack.encode({"major": 2, "schema": "another thing altogether"}),
    ):
        with pytest.raises(Refused, match="protocol version 2"):
            dialect.decode_info(stock_info(moe=native))


_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["args", "kwargs", "outputs", "optional", "batched", "sizes", "dtype", "x"]), inner
        )
    ),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(st.fixed_dictionaries({"args": _plain, "kwargs": _plain, "outputs": _plain, "optional": _plain}))
def test_any_description_is_a_schema_or_a_typed_error(plain: Any) -> None:
    native = msgspec.msgpack.encode({"schema": plain, "max_batch_size": 1})
    try:
        dialect.decode_info(stock_info(moe=native)).expert_schema()
    except ProtocolError:
        return


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 200))
def test_corrupted_rpc_info_is_an_expert_or_a_typed_error(noise: bytes, position: int) -> None:
    data = bytearray(stock_info())
    data[position : position + len(noise)] = noise
    try:
        dialect.decode_info(bytes(data))
    except ProtocolError:
        return


def test_codecs_have_the_numbers_of_hivemind() -> None:
    for codec in Compression:
        assert runtime_pb2.CompressionType.Value(codec.name) == codec
    assert EncodedTensor("float32", (1,), Compression.NONE, b"1234").codec == 0


EMPTY_TENSOR, EMPTY_SIZE = b"\x12\x00", b"\x10\x01"  # two bytes each: a tensor in a message, an axis in a tensor


def in_tensor(data: bytes) -> bytes:
    return b"\x12" + length_of(data) + data


def length_of(data: bytes) -> bytes:
    length, encoded = len(data), b""
    while length >= 0x80:
        encoded, length = encoded + bytes([length & 0x7F | 0x80]), length >> 7
    return encoded + bytes([length])


@pytest.mark.parametrize(
    "data",
    [
        EMPTY_TENSOR * 2_000_000,
        in_tensor(EMPTY_SIZE * 2_000_000),
        in_tensor(b"\x12" + length_of(bytes(4_000_000)) + bytes(4_000_000)),  # an axis a byte
        b"\x0a\x00" * 2_000_000,  # the uid, over and over
        b"\x80" * 4_000_000,  # a number without an end
        b"\x12\xff\xff\xff\xff\x7f",  # longer than the message
        b"\x0b",  # a group
    ],
    ids=lambda data: f"{len(data)} bytes, {data[:4].hex()}",
)
def test_messages_of_a_million_parts_are_refused_before_they_are_parsed(data: bytes) -> None:
    for message_type in (dialect.ExpertRequest, dialect.ExpertResponse):
        begin = time.process_time()
        with pytest.raises(ProtocolError):
            dialect.Bounded(message_type).FromString(data)
        assert time.process_time() - begin < 1.0


@given(
    uid=st.text(max_size=20),
    tensors=st.lists(st.tuples(st.lists(st.integers(0, 2**32 - 1), max_size=5), st.binary(max_size=20)), max_size=5),
    metadata=st.binary(max_size=20),
)
def test_what_has_no_more_parts_than_a_call_is_parsed_as_ever(
    uid: str, tensors: list[tuple[list[int], bytes]], metadata: bytes
) -> None:
    messages = [runtime_pb2.Tensor(size=size, buffer=buffer, dtype="float32") for size, buffer in tensors]
    request = dialect.ExpertRequest(uid=uid, tensors=messages, metadata=metadata)
    assert dialect.Bounded(dialect.ExpertRequest).FromString(request.SerializeToString()) == request


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    for message_type in (dialect.ExpertRequest, dialect.ExpertResponse):
        try:
            dialect.Bounded(message_type).FromString(data)
        except ProtocolError:
            continue
