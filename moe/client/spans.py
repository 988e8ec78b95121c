"""Spans: consecutive blocks at one server. Owns: what servers say of their blocks, and what of a span goes into one request.

Must not know: routes, retries, autograd. Everything runs in the client's event loop. A server that runs chains gets a span in
one request; another one (a stock hivemind server) gets its blocks one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec
import torch

from moe.chains import Chain
from moe.client.references import Kept, KeptRows
from moe.client.requests import (
    Described,
    Gradients,
    Request,
    Terms,
    TooManyRows,
    by_rows,
    describe_at,
    in_parallel,
    join_gradients,
    join_outputs,
    make_header,
    part_of_request_id,
)
from moe.client.routing import Span
from moe.config import ClientConfig
from moe.errors import MoEError, SchemaError
from moe.expert_uid import PeerIDLike
from moe.schema import MAX_TENSORS, Entry, ExpertSchema, cast_inputs, count_rows
from moe.transport.base import Budget, ExpertTransport, within
from moe.wire.messages import (
    MAX_CHAIN_BLOCKS,
    MAX_HEADER_BYTES,
    MAX_METADATA_BYTES,
    REQUEST_ID_BYTES,
    encode_header,
)

MAX_REMEMBERED = 16384  # descriptions; ours, a few KB each at the most where schemas are equal


class Unsuitable(MoEError):
    """A server's block is not the one this call was made for: nobody's failure, but it has to go elsewhere."""


class BoundCall:
    """A call of a sequence, or a range of its rows: which tensor goes where, ready to be sent.

    :param chain: all blocks of the sequence
    :param tensors: args of the first block and kwargs, flat; CPU, in the schemas' dtypes
    """

    def __init__(self, chain: Chain, tensors: Sequence[torch.Tensor]):
        self.chain, self.tensors = chain, list(tensors)
        self.rows = count_rows(chain.entries, [tensor.shape for tensor in tensors])
        self._parts: dict[tuple[int, int], tuple[Chain, tuple[int, ...]]] = {}

    def __repr__(self) -> str:
        return f"BoundCall({self.chain!r}, {self.rows} rows)"

    @property
    def args(self) -> list[torch.Tensor]:
        """Those of the first block, flat."""
        return self.tensors[: self.chain.args]

    def part(self, span: Span) -> tuple[Chain, tuple[int, ...]]:
        """The chain of a span, and the positions of the kwarg tensors it takes."""
        key = (span.start, span.end)
        if key not in self._parts:
            self._parts[key] = self.chain.part(*key)
        return self._parts[key]

    def inputs_of(self, span: Span, args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A span's tensors: its args in the dtypes it takes, then kwargs."""
        chain, used = self.part(span)
        args = cast_inputs(chain.blocks[0].schema.arg_entries, args)
        return [*args, *(self.tensors[position] for position in used)]


class SpanGradients(NamedTuple):
    """What a span's backward gives.

    :ivar args: of the args of its first block; None for those that were not wanted
    :ivar kwargs: (position among the call's tensors, gradient); of one tensor there may be several
    """

    args: Gradients
    kwargs: list[tuple[int, torch.Tensor]]


class KnownBlocks:
    """What servers have told of their blocks. Shared by a sequence and its slices.

    :ivar schemas: by uid, from whichever server told first: what calls are checked against
    :ivar tellers: by uid, base58 of that server
    """

    def __init__(self) -> None:
        self.schemas: dict[str, Described] = {}
        self.tellers: dict[str, str] = {}
        self._told: OrderedDict[tuple[str, str], Described] = OrderedDict()
        self.asking: dict[tuple[str, str], asyncio.Future[Described]] = {}

    def __repr__(self) -> str:
        return f"KnownBlocks({len(self.schemas)} blocks, {len(self._told)} descriptions)"

    def find(self, peer: str, uid: str) -> Described | None:
        """What this server told of this block."""
        return self._told.get((peer, uid))

    def remember(self, peer: str, described: Described, uid: str) -> Described:
        """Note what a server told; equal schemas are one object."""
        known = self.schemas.get(uid)
        if known is not None and known[0].schema == described[0].schema:
            described = described[0], known[1]
        self._told[peer, uid] = described
        while len(self._told) > MAX_REMEMBERED:
            self._told.popitem(last=False)
        return described

    def believe(self, uid: str, described: Described, peer: str) -> None:
        """Check calls of this block against this from now on."""
        self.schemas[uid], self.tellers[uid] = described, peer

    def take_rows(self, peer: str, uid: str, max_rows: int) -> None:
        """A server takes only so many rows of this block in one request."""
        told = self._told.get((peer, uid))
        if told is not None and max_rows < told[0].max_batch_size:
            self._told[peer, uid] = msgspec.structs.replace(told[0], max_batch_size=max_rows), told[1]

    def forget(self, peer: str) -> None:
        """This server may be another one next time."""
        for key in [key for key in self._told if key[0] == peer]:
            self._told.pop(key, None)

    def clear(self) -> None:
        """Ask everything again. From any thread."""
        self.schemas, self.tellers, self._told = {}, {}, OrderedDict()


class SpanCaller:
    """Calls spans of the blocks of a sequence.

    :param transport: how calls travel
    :param config: deadlines
    :param known: what servers have told
    """

    def __init__(self, transport: ExpertTransport, config: ClientConfig, known: KnownBlocks):
        self.transport, self.config, self.known = transport, config, known

    def __repr__(self) -> str:
        return f"SpanCaller({self.known!r})"

    # --- what servers say ------------------------------------------------------------------------------------------------

    async def describe(self, peer: PeerIDLike, uids: Sequence[str], budget: Budget) -> list[Described]:
        """What a server tells of some blocks; asked for once.

        :raises MoEError: it does not answer, or not with a description
        """
        distinct = list(dict.fromkeys(uids))
        told = dict(zip(distinct, await in_parallel(lambda uid: self._told(peer, uid, budget), distinct)))
        return [told[uid] for uid in uids]

    async def _told(self, peer: PeerIDLike, uid: str, budget: Budget) -> Described:
        name = peer.to_base58()
        known = self.known.find(name, uid)
        if known is not None:
            return known
        asking = self.known.asking.get((name, uid))
        if asking is None or asking.get_loop() is not asyncio.get_running_loop():  # the parent's, after a fork
            asking = self.known.asking[name, uid] = asyncio.ensure_future(self._ask(peer, uid))
            asking.add_done_callback(lambda future: self._asked(name, uid, future))
        return await within(asyncio.shield(asking), budget.left_s(), f"info of {uid}", name)

    async def _ask(self, peer: PeerIDLike, uid: str) -> Described:
        described = await describe_at(self.transport, peer, uid, self.config.connect_timeout_s)
        return self.known.remember(peer.to_base58(), described, uid)

    def _asked(self, peer: str, uid: str, future: asyncio.Future[Described]) -> None:
        self.known.asking.pop((peer, uid), None)
        if not future.cancelled():
            future.exception()  # those who asked may have gone

    async def _terms(self, call: BoundCall, span: Span, budget: Budget) -> Terms:
        """What the server takes in requests for this span.

        :raises Unsuitable: its blocks are other ones
        """
        blocks = call.chain.blocks[span.start : span.end]
        described = await self.describe(span.peer_id, [block.uid for block in blocks], budget)
        for block, (description, schema) in zip(blocks, described):
            if not _suits(block.schema, schema, block.present):
                stock = "" if description.native else " (a stock hivemind server, no global or optional kwargs)"
                raise Unsuitable(
                    f"{block.uid} takes {schema}{stock} there, which does not fit this call for {block.schema}",
                    peer=span.peer_id.to_base58(),
                    uid=block.uid,
                )
        return Terms.of([description for description, _ in described])

    async def cut(self, call: BoundCall, span: Span, budget: Budget) -> list[Span]:
        """The pieces of a span that fit into one request each, one row at least.

        :raises Unsuitable: the server's blocks are other ones
        """
        terms = await self._terms(call, span, budget)
        if not terms.chains:
            return [Span(span.peer_id, block, block + 1) for block in range(span.start, span.end)]
        return _cut(call, span, terms)

    # --- calls -----------------------------------------------------------------------------------------------------------

    async def forward(
        self, call: BoundCall, span: Span, args: Sequence[torch.Tensor], budget: Budget, kept: KeptRows | None = None
    ) -> list[torch.Tensor]:
        """Flat outputs of the span's last block.

        :param args: of its first block, flat
        :param kept: where to note that the server keeps the inputs for the backward; None: it need not
        :raises MoEError: the server failed, or its answer does not fit
        """
        terms = await self._terms(call, span, budget)
        request = self._request(call, span)
        entries, tensors = request.chain.entries, call.inputs_of(span, args)
        ranges = _row_ranges(request, terms, entries, tensors, call.rows, span)
        timeout_s = budget.left_s(self.config.request_timeout_s)

        async def send(part: Sequence[torch.Tensor], start: int, end: int) -> list[torch.Tensor]:
            note = _note(kept, (start, end))
            with self._learning(call, span):
                return await request.forward(span.peer_id, terms, part, end - start, timeout_s, note)

        return await by_rows(send, entries, tensors, ranges, join_outputs)

    async def backward(
        self,
        call: BoundCall,
        span: Span,
        args: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        wants: Sequence[bool],
        first_needed: int,
        request_id: bytes,
        budget: Budget,
        kept: KeptRows,
    ) -> SpanGradients:
        """Gradients of the span's tensors, given those of its floating-point outputs; trains its blocks, once.

        :param wants: which of the call's tensors want a gradient
        :param first_needed: where the backward will end, see ``Chain.first_needed``
        :param request_id: of the backward of all blocks
        :param kept: what the forward of this span has noted
        :raises MoEError: the server failed, or its answer does not fit
        """
        terms = await self._terms(call, span, budget)
        request = self._request(call, span)
        _, used = call.part(span)
        count = len(args)
        flags = call.chain.wants_of(span.start, wants, first_needed)[:count] + tuple(wants[p] for p in used)
        entries = request.chain.entries
        every, tensors = (
            (*entries, *request.chain.gradient_entries),
            [*call.inputs_of(span, args), *grad_outputs],
        )
        ranges = _row_ranges(request, terms, every, tensors, call.rows, span)
        timeout_s = budget.left_s(self.config.request_timeout_s)

        async def send(part: Sequence[torch.Tensor], start: int, end: int) -> Gradients:
            inputs, grads = part[: len(entries)], part[len(entries) :]
            ids = [part_of_request_id(request_id, block, start, end) for block in range(span.start, span.end)]
            note = kept.get((start, end))
            with self._learning(call, span):
                return await request.backward(span.peer_id, terms, inputs, grads, flags, ids, timeout_s, note)

        def join(pieces: Sequence[Gradients]) -> Gradients:
            return join_gradients(entries, pieces)

        grads = await by_rows(send, every, tensors, ranges, join)
        kwargs = [(position, grad) for position, grad in zip(used, grads[count:]) if grad is not None]
        return SpanGradients(grads[:count], kwargs)

    @contextlib.contextmanager
    def _learning(self, call: BoundCall, span: Span) -> Iterator[None]:
        """Remember how many rows a stock server takes, which it says when there are more."""
        try:
            yield
        except TooManyRows as e:
            for block in call.chain.blocks[span.start : span.end]:
                self.known.take_rows(span.peer_id.to_base58(), block.uid, e.max_rows)
            raise

    def _request(self, call: BoundCall, span: Span) -> Request:
        return Request(self.transport, call.part(span)[0], self.config)


def _row_ranges(
    request: Request,
    terms: Terms,
    entries: Sequence[Entry],
    tensors: Sequence[torch.Tensor],
    rows: int,
    span: Span,
) -> list[tuple[int, int]]:
    """``Request.row_ranges``; what one server does not take, another one may.

    :raises Unsuitable: it cannot be split
    """
    try:
        return request.row_ranges(terms, entries, tensors, rows)
    except SchemaError as e:
        raise Unsuitable(e.message, peer=span.peer_id.to_base58(), uid=request.uid) from None


def _note(kept: KeptRows | None, bounds: tuple[int, int]) -> Kept | None:
    return None if kept is None else kept.setdefault(bounds, Kept())


def _cut(call: BoundCall, span: Span, terms: Terms) -> list[Span]:
    """Halve a span until each piece fits into a request."""
    if len(span) == 1 or _fits(call, span, terms):
        return [span]
    middle = (span.start + span.end) // 2
    halves = Span(span.peer_id, span.start, middle), Span(span.peer_id, middle, span.end)
    return [piece for half in halves for piece in _cut(call, half, terms)]


def _fits(call: BoundCall, span: Span, terms: Terms) -> bool:
    chain, used = call.part(span)
    if len(chain) > MAX_CHAIN_BLOCKS or len(chain.users) > MAX_TENSORS:
        return False
    every = (True,) * len(chain.users)
    header = make_header(chain, True, 1.0, every, [bytes(REQUEST_ID_BYTES)] * len(chain))
    assert header is not None
    if len(encode_header(header)) > MAX_HEADER_BYTES - MAX_METADATA_BYTES:
        return False
    kwargs = chain.entries[chain.args :]
    half = replace(terms, max_bytes=terms.max_bytes // 2)  # the rest is for args and gradients
    return half.room(kwargs, [call.tensors[position] for position in used], call.rows) > 0


def _suits(own: ExpertSchema, theirs: ExpertSchema, present: tuple[str, ...]) -> bool:
    """Can a call made for one schema be sent to a server of the other? Codecs may differ."""
    if own is theirs:
        return True
    if not set(present) <= set(theirs.optional) or len(own.arg_entries) != len(theirs.arg_entries):
        return False
    return _shapes_of(own.input_entries(present)) == _shapes_of(theirs.input_entries(present)) and (
        [proto for _, proto in _shapes_of(own.output_entries)]
        == [proto for _, proto in _shapes_of(theirs.output_entries)]
    )


def _shapes_of(entries: Sequence[Entry]) -> list[tuple[str, tuple[object, ...]]]:
    return [(path, (proto.batched, proto.dtype, proto.sizes)) for path, proto in entries]
