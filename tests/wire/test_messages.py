"""Headers: what they carry, that versions are said and checked, and that nothing but a header is taken for one."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ExpertFailed, Overloaded, ProtocolError, Refused, RemoteError
from moe.schema import BatchTensorProto, ExpertSchema
from moe.wire.messages import (
    FEATURES,
    MAX_CHAIN_BLOCKS,
    MAX_ERROR_CHARS,
    MAX_HEADER_BYTES,
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    BlockInputs,
    ExpertDescription,
    ReplyHeader,
    RequestHeader,
    WireError,
    decode_reply_header,
    decode_request_header,
    encode_header,
    new_request_id,
)

names = st.text(max_size=20)
blocks = st.builds(
    BlockInputs,
    present=st.lists(names, max_size=3).map(tuple),
    tensors=st.lists(st.integers(0, 4095), max_size=4).map(tuple),
    request_id=st.none() | st.binary(min_size=16, max_size=16),
)
requests = st.builds(
    RequestHeader,
    request_id=st.none() | st.binary(min_size=16, max_size=16),
    time_left_s=st.none() | st.floats(min_value=0, allow_nan=False),
    present=st.lists(names, max_size=4).map(tuple),
    wants_grad=st.none() | st.lists(st.booleans(), max_size=4).map(tuple),
    chain=st.none() | st.lists(blocks, min_size=1, max_size=4).map(tuple),
)
replies = st.builds(
    ReplyHeader,
    error=st.none() | st.builds(WireError, code=names, message=names),
    has_grad=st.none() | st.lists(st.booleans(), max_size=4).map(tuple),
    queue_s=st.floats(allow_nan=False),
    compute_s=st.floats(allow_nan=False),
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from(
    [*RequestHeader.__struct_fields__, *ReplyHeader.__struct_fields__, *BlockInputs.__struct_fields__, "future"]
)


@given(requests)
def test_a_request_header_arrives_as_it_was_sent(header: RequestHeader) -> None:
    assert decode_request_header(encode_header(header)) == header


@given(replies)
def test_a_reply_header_arrives_as_it_was_sent(header: ReplyHeader) -> None:
    assert decode_reply_header(encode_header(header)) == header


def test_an_empty_header_is_a_stock_peer_and_ours_is_never_empty() -> None:
    assert decode_request_header(b"") is None
    assert decode_reply_header(b"") is None
    assert encode_header(RequestHeader())
    assert encode_header(ReplyHeader())


def test_every_header_says_its_version_and_requests_their_features() -> None:
    """In the bytes, not by default: the next version's default is another one."""
    request = msgspec.msgpack.decode(encode_header(RequestHeader()))
    assert (request["major"], request["minor"], tuple(request["features"])) == (
        PROTOCOL_MAJOR,
        PROTOCOL_MINOR,
        FEATURES,
    )
    assert msgspec.msgpack.decode(encode_header(ReplyHeader()))["major"] == PROTOCOL_MAJOR
    schema = ExpertSchema((BatchTensorProto(),)).to_plain()
    description = msgspec.msgpack.decode(msgspec.msgpack.encode(ExpertDescription(schema=schema, max_batch_size=1)))
    assert (description["major"], description["minor"]) == (PROTOCOL_MAJOR, PROTOCOL_MINOR)
    assert tuple(description["features"]) == FEATURES


def test_unknown_keys_and_features_and_a_higher_minor_version_are_ignored() -> None:
    data = msgspec.msgpack.encode(
        {
            "major": 1,
            "minor": 99,
            "features": ["telepathy"],
            "present": ["mask"],
            "color": {"of": ["the", "sky"]},
            "chain": [{"tensors": [1], "mood": "good"}],
        }
    )
    header = decode_request_header(data)
    assert header is not None
    assert header.present == ("mask",)
    assert header.features == ("telepathy",)
    assert header.chain == (BlockInputs(tensors=(1,)),)
    assert decode_reply_header(msgspec.msgpack.encode({"weather": 3})) == ReplyHeader()


@pytest.mark.parametrize("decode", [decode_request_header, decode_reply_header])
@pytest.mark.parametrize("more", [{}, {"present": 5, "error": 5, "time_left_s": "soon", "has_grad": {}}])
def test_a_higher_major_version_is_refused_by_name_even_if_its_fields_have_changed(decode: Any, more: Any) -> None:
    with pytest.raises(Refused, match="protocol version 7, this side speaks up to 1"):
        decode(msgspec.msgpack.encode({"major": 7, **more}))


@pytest.mark.parametrize(
    "fields",
    [
        {"major": "one"},
        {"major": 1.5},
        {"request_id": b"short"},
        {"request_id": b"x" * 17},
        {"request_id": "x" * 16},
        {"time_left_s": -1.0},
        {"time_left_s": "soon"},
        {"present": "mask"},
        {"present": [1]},
        {"present": ["x" * 257]},
        {"present": ["x"] * 4097},
        {"wants_grad": [1, 0]},
        {"wants_grad": [True] * 4097},
        {"features": ["x"] * 65},
        {"chain": []},
        {"chain": {}},
        {"chain": [{}] * (MAX_CHAIN_BLOCKS + 1)},
        {"chain": [{"present": "mask"}]},
        {"chain": [{"present": ["x" * 257]}]},
        {"chain": [{"tensors": [-1]}]},
        {"chain": [{"tensors": [4096]}]},
        {"chain": [{"tensors": [1.5]}]},
        {"chain": [{"tensors": [0] * 4097}]},
        {"chain": [{"request_id": b"short"}]},
    ],
    ids=repr,
)
def test_fields_of_another_type_or_size_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=f"metadata: malformed request header: .*{next(iter(fields))}"):
        decode_request_header(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x00",
        b"\x90",
        b"\x81\xa5major",
        b"\x80\x80",
        b"\x81\xa7present\xdd\xff\xff\xff\xff",
        b"\x91" * 60_000,
        b"\x81\xa6future" + b"\x91" * 60_000,
        b"\x80" * (MAX_HEADER_BYTES + 1),
        b"\x81\xa7present\x91\xa1\xff",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_bytes_that_are_no_header_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="metadata"):
        decode_request_header(data)


@settings(max_examples=100)
@given(st.dictionaries(keys, values, max_size=4) | values, st.integers(0, 8))
def test_anything_else_is_a_header_or_a_typed_error(content: Any, cut: int) -> None:
    data = msgspec.msgpack.encode(content)
    for decode in (decode_request_header, decode_reply_header):
        for sent in (data, data[: len(data) - cut]):
            try:
                header = decode(sent)
            except (ProtocolError, Refused) as e:
                assert len(e.message) <= MAX_ERROR_CHARS
            else:
                assert header is None or header.major <= PROTOCOL_MAJOR


def test_a_time_left_that_is_no_number_sets_no_limit_below_the_servers_own() -> None:
    try:
        header = decode_request_header(msgspec.msgpack.encode({"time_left_s": math.nan}))
    except ProtocolError:
        return
    assert header is not None
    assert min(300.0, header.time_left_s or 0.0) == 300.0  # as ConnectionHandler uses it


def test_errors_keep_their_class_and_lose_what_is_private() -> None:
    error = Refused("args[0]: expected this, got that", peer="here", uid="e.0")
    wire = decode_reply_header(encode_header(ReplyHeader(error=WireError.from_exception(error))))
    assert wire is not None
    assert wire.error is not None
    restored = wire.error.to_exception(peer="there", uid="e.1")
    assert type(restored) is Refused
    assert (restored.message, restored.peer, restored.uid) == (error.message, "there", "e.1")
    assert isinstance(WireError(code="overloaded", message="x").to_exception(peer=None, uid=None), Overloaded)
    unknown = WireError(code="invented tomorrow", message="x").to_exception(peer=None, uid=None)
    assert type(unknown) is RemoteError
    assert not unknown.retryable


def test_a_long_error_fits() -> None:
    wire = WireError.from_exception(ExpertFailed("é" * 10_000))
    assert decode_reply_header(encode_header(ReplyHeader(error=wire))) == ReplyHeader(error=wire)


def test_request_ids_are_random() -> None:
    assert len({new_request_id() for _ in range(100)}) == 100
    assert len(new_request_id()) == 16


def test_a_description_holds_a_schema_or_says_so() -> None:
    schema = ExpertSchema((BatchTensorProto(3),))
    assert ExpertDescription(schema=schema.to_plain(), max_batch_size=1).expert_schema() == schema
    with pytest.raises(ProtocolError, match="malformed"):
        ExpertDescription(schema={"args": 5}, max_batch_size=1).expert_schema()
