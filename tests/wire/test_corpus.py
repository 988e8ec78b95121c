"""Every parser of what peers send, on a kept corpus and on mutations of it: a value or a typed error, soon, in little memory.

``corpus.txt`` has a line for each input: the parser, the bytes in hexadecimal, what they are. Whatever made a parser fail once
is added there.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse, ExpertUID
from hivemind.utils import MSGPackSerializer
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.dht import records
from moe.errors import MoEError, SchemaError
from moe.schema import DTYPES, Compression
from moe.transport.tickets import decode_ticket
from moe.wire.frames import CANCEL, DATA, HELLO, OPEN, WELCOME, Frame, FrameParser, decode_opening
from moe.wire.hivemind_dialect import Bounded, TensorAssembler, decode_info
from moe.wire.messages import decode_description, decode_reply_header, decode_request_header
from moe.wire.tensors import max_encoded_bytes

MAX_SECONDS = 2.0  # far more than any takes, on a busy machine, too
MAX_MEMORY_BYTES = 2**25


class Sink:
    """Takes tensors of a link, a little at a time."""

    def room_for(self, call: int, length: int) -> memoryview:
        return memoryview(bytearray(min(length, 4096)))

    def filled(self, call: int, length: int) -> None: ...


class Gate:
    """Admits tensors of up to a MiB."""

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        if dtype not in DTYPES:
            raise SchemaError(f"a dtype {dtype!r}")
        return min(max_encoded_bytes(shape, DTYPES[dtype], codec), 2**20)


def frames(data: bytes) -> None:
    def opened(frame: Frame) -> None:
        if frame.kind == OPEN:
            decode_opening(frame.payload)

    parser = FrameParser(opened, Sink(), frozenset((HELLO, WELCOME, OPEN, DATA, CANCEL)))
    while data:
        room = parser.buffer()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        parser.advance(count)
        data = data[count:]


def tensors(message_type: Any) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        assembler = TensorAssembler(Gate())
        assembler.feed_all(Bounded(message_type).FromString(data).tensors)
        return assembler.finish()

    return parse


def record(data: bytes) -> None:
    """A value of the DHT, whichever it is taken for. hivemind unpacks it, with its own limits."""
    value = MSGPackSerializer.loads(data)
    peers = records.PeerIDs()
    found = {
        subkey: records.Record(value, 1e9) for subkey in (0, "12D3KooWNoPeer", value if isinstance(value, str) else 1)
    }
    records.read_successors("ffn.", found, peers)
    records.read_hosted("_moe.experts.ffn.", found, peers)
    records.read_part_count(value)
    for read in (lambda: records.read_parts([value]), lambda: records.ServerInfo.from_plain(value)):
        try:
            read()
        except ValueError:
            continue


PARSERS: dict[str, Callable[[bytes], Any]] = {
    "frames": frames,
    "opening": decode_opening,
    "request header": decode_request_header,
    "reply header": decode_reply_header,
    "description": decode_description,
    "info": decode_info,
    "ticket": decode_ticket,
    "stock request": tensors(ExpertRequest),
    "stock reply": tensors(ExpertResponse),
    "stock uid": Bounded(ExpertUID).FromString,
    "record": record,
}
CORPUS = [
    (name, bytes.fromhex(data), what)
    for name, data, what in (
        line.split(" | ")
        for line in Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
]


def check(name: str, data: bytes) -> None:
    tracemalloc.start()
    begin = time.monotonic()
    try:
        PARSERS[name](data)
    except MoEError:
        pass
    except Exception:
        if name != "record":  # hivemind's unpacking raises what it likes, and its DHT nodes expect that
            raise
    finally:
        seconds = time.monotonic() - begin
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seconds < MAX_SECONDS
    assert peak_bytes < MAX_MEMORY_BYTES


@pytest.mark.parametrize(("name", "data"), [pytest.param(n, d, id=f"{n}: {what}") for n, d, what in CORPUS])
def test_kept_inputs(name: str, data: bytes) -> None:
    check(name, data)


def test_every_parser_has_inputs() -> None:
    assert {name for name, _, _ in CORPUS} == set(PARSERS)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutations_of_kept_inputs(data: st.DataObject) -> None:
    name, kept, _ = data.draw(st.sampled_from(CORPUS))
    mutated = bytearray(kept)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated)))
        how = data.draw(st.sampled_from(["set", "insert", "cut", "repeat", "end"]))
        if how == "set" and at < len(mutated):
            mutated[at] = data.draw(st.integers(0, 255))
        elif how == "insert":
            mutated[at:at] = data.draw(st.binary(max_size=9))
        elif how == "cut":
            del mutated[at : at + data.draw(st.integers(1, 8))]
        elif how == "repeat":
            mutated[at:at] = mutated[at : at + 16] * data.draw(st.integers(1, 200))
        else:
            del mutated[at:]
    other = data.draw(st.sampled_from([name, name, name, *PARSERS]))  # sometimes of another parser
    check(other, bytes(mutated))
