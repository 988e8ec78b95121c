"""One request to one server: what is sent, and what came back. Owns: headers, codecs, splitting by rows, checks of replies.

A request is for a chain of blocks (moe.chains); that of a single expert is a chain of one. Shared by ExpertCaller and the spans
of a sequence. Whatever a server's bytes make this process raise becomes one of our errors here (``Blaming``), so that those who
choose servers go on with another one. Must not know: which server is asked, retries, autograd. CPU tensors; its coroutines run
in the client's event loop, the rest anywhere.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

from moe.chains import Chain
from moe.client.references import Kept, Referring, may_refer
from moe.config import ClientConfig
from moe.errors import (
    ExpertFailed,
    LifecycleError,
    MoEError,
    NonFiniteError,
    ProtocolError,
    RemoteError,
    RemoteSchemaError,
    SchemaError,
    TransportError,
    printable,
)
from moe.expert_uid import PeerIDLike, join_chain
from moe.schema import Entry, ExpertSchema, TensorProto, count_rows, select_rows, validate
from moe.transport.base import BACKWARD, FORWARD, Call, ExpertTransport, Reply
from moe.wire.messages import (
    HELD_TENSORS,
    REQUEST_ID_BYTES,
    BlockInputs,
    ExpertDescription,
    Metadata,
    RequestHeader,
    check_metadata,
)

T = TypeVar("T")
Item = TypeVar("Item")
Gradients = list["torch.Tensor | None"]
Described = tuple[ExpertDescription, ExpertSchema]

MAX_PARALLEL = 32  # parts of one call on their way; ours, bounds what a client has in flight
MAX_ROW_BYTES = 2**30  # of what an expert may say that it returns for one row; ours
MAX_REPLY_BYTES = (
    2**30
)  # a call whose outputs are larger is split, as one whose inputs are larger than a server takes; ours

_REQUEST_FILL = 0.95  # of a server's max_request_bytes; the rest is headroom for codecs
_IN_LOOP_BYTES = 2**20  # more is joined, or looked through, off the event loop; ours, about a millisecond
_UNKNOWN_BYTES = 2**25  # of outputs of unknown lengths of a stock server: more than fits a unary reply
_STOCK_MAX_ROWS = re.compile(r"Task size greater than max_batch_size \(([0-9]{1,9})\)")  # hivemind's TaskPool


class TooManyRows(RemoteError):
    """A stock server does not take this many rows in one request, which it says only now."""

    def __init__(self, message: str = "", *, max_rows: int = 0, peer: str | None = None, uid: str | None = None):
        super().__init__(message, peer=peer, uid=uid)
        self.max_rows = max_rows


class Blaming:
    """A context in which a peer's answer is waited for and looked at: whatever is raised is one of our errors, and no mistake
    of the caller's.

    :param peer: whose answer
    """

    __slots__ = ("_peer",)

    def __init__(self, peer: PeerIDLike):
        self._peer = peer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, _OF_PEERS):
            return
        peer = self._peer.to_base58()
        if isinstance(error, SchemaError):
            raise RemoteSchemaError(error.message, peer=peer, uid=error.uid) from error
        if isinstance(error, MoEError):
            raise RemoteError(error.message, peer=peer, uid=error.uid) from error
        what = printable(f"{type(error).__name__}: {error}")
        raise ProtocolError(f"what the server sent makes no sense: {what}", peer=peer) from error


_OF_PEERS = (RemoteError, ProtocolError, TransportError, LifecycleError)  # the last one: our event loop has ended


async def describe_at(transport: ExpertTransport, peer: PeerIDLike, uid: str, timeout_s: float | None) -> Described:
    """What a server tells of an expert, checked.

    :raises MoEError: it does not answer, or with nonsense
    """
    with Blaming(peer):
        description = await transport.info(peer, uid, timeout_s=timeout_s)
        return description, checked_schema(description)


def checked_schema(description: ExpertDescription) -> ExpertSchema:
    """The schema of a description, if an expert can have it.

    :raises ProtocolError: it cannot
    """
    schema = description.expert_schema()
    if schema.outputs is None:
        raise ProtocolError("the description of an expert that returns nothing")
    if sum(map(_known_bytes, (entry.proto for entry in schema.output_entries))) > MAX_ROW_BYTES:
        raise ProtocolError(f"the description of an expert that returns more than {MAX_ROW_BYTES} bytes for one row")
    return schema


@dataclass(frozen=True)
class Terms:
    """What a server takes in one request.

    :ivar native: it reads our header; else it is a stock hivemind server
    :ivar chains: it runs several blocks for one request
    :ivar holds: it holds tensors, to which later requests may refer
    :ivar max_rows: of a request
    :ivar max_bytes: of a request's tensors
    """

    native: bool
    chains: bool
    holds: bool
    max_rows: int
    max_bytes: int

    @classmethod
    def of(cls, descriptions: Sequence[ExpertDescription]) -> Terms:
        """Those of a request for all of these experts of one server."""
        return cls(
            native=all(description.native for description in descriptions),
            chains=all("chain" in description.features for description in descriptions),
            holds=all(HELD_TENSORS in description.features for description in descriptions),
            max_rows=min(description.max_batch_size for description in descriptions),
            max_bytes=min(description.max_request_bytes for description in descriptions),
        )

    def room(self, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], rows: int) -> int:
        """How many of the rows fit into one request."""
        shared = sum(t.nbytes for entry, t in zip(entries, tensors) if not entry.proto.batched)
        per_row = sum(t.nbytes for entry, t in zip(entries, tensors) if entry.proto.batched) / max(1, rows)
        left = _REQUEST_FILL * self.max_bytes - shared
        if left < per_row:
            return 0
        return min(self.max_rows, int(left // per_row)) if per_row else self.max_rows


def make_header(
    chain: Chain,
    native: bool,
    timeout_s: float | None,
    wants_grad: tuple[bool, ...] | None = None,
    request_ids: Sequence[bytes] | None = None,
    metadata: Metadata | None = None,
) -> RequestHeader | None:
    """What the server is told besides the tensors; None for a stock server.

    :param request_ids: for a backward, one for each block
    """
    if not native:
        return None
    ids: Sequence[bytes | None] = request_ids or [None] * len(chain)
    metadata = metadata or {}
    if len(chain) == 1:
        return RequestHeader(
            present=chain.blocks[0].present,
            wants_grad=wants_grad,
            request_id=ids[0],
            time_left_s=timeout_s,
            metadata=metadata,
        )
    blocks = tuple(
        BlockInputs(present=block.present, tensors=block.kwargs, request_id=request_id)
        for block, request_id in zip(chain.blocks, ids)
    )
    return RequestHeader(chain=blocks, wants_grad=wants_grad, time_left_s=timeout_s, metadata=metadata)


def part_of_request_id(request_id: bytes, *parts: int) -> bytes:
    """The id of one part (a block, a range of rows) of what a client does once; the same parts always get the same id."""
    text = ",".join(map(str, parts)).encode()
    return hashlib.blake2b(text, key=request_id, digest_size=REQUEST_ID_BYTES).digest()


class Request:
    """Requests for a chain, to one server at a time.

    :param transport: how they travel
    :param chain: which blocks, and which tensor each takes
    :param config: whether to look for anomalies, and to refer to what servers hold
    """

    def __init__(self, transport: ExpertTransport, chain: Chain, config: ClientConfig):
        self.transport, self.chain, self.config = transport, chain, config
        self.uid = join_chain([block.uid for block in chain.blocks])
        self._codecs = tuple(entry.proto.compression for entry in chain.entries)
        self._output_codecs = frozenset((0, *(entry.proto.compression for entry in chain.output_entries)))
        self._gradient_codecs = frozenset((0, *self._codecs))

    def __repr__(self) -> str:
        return f"Request({self.chain!r})"

    async def forward(
        self,
        peer: PeerIDLike,
        terms: Terms,
        tensors: Sequence[torch.Tensor],
        rows: int,
        timeout_s: float | None,
        kept: Kept | None = None,
    ) -> list[torch.Tensor]:
        """Flat outputs of the last block.

        :param kept: where to note that the server keeps the inputs for the backward; None: it need not
        :raises ProtocolError: the answer does not fit
        :raises NonFiniteError: it has nan or inf, and anomalies are to be detected
        """
        call = self.forward_call(peer, terms, tensors, rows, timeout_s)
        reply = await self._send(peer, terms, call, rows, kept, timeout_s)
        return await off_loop(self._looked_through(reply, peer), self.outputs, reply, rows, peer)

    async def backward(
        self,
        peer: PeerIDLike,
        terms: Terms,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        wants: tuple[bool, ...],
        request_ids: Sequence[bytes],
        timeout_s: float | None,
        kept: Kept | None = None,
    ) -> Gradients:
        """One gradient or None per input; trains each block, once per request id.

        :param kept: what the forward of the same inputs has noted
        :raises ProtocolError: the answer does not fit
        :raises NonFiniteError: it has nan or inf, and anomalies are to be detected
        """
        call = self.backward_call(peer, terms, inputs, grad_outputs, wants, request_ids, timeout_s)
        reply = await self._send(peer, terms, call, _rows(self.chain.entries, inputs), kept, timeout_s)
        return await off_loop(self._looked_through(reply, peer), self.gradients, inputs, wants, reply, peer)

    def may_refer(self, terms: Terms, method: str, inputs: Sequence[torch.Tensor], kept: Kept | None) -> bool:
        """Could the server hold one of the tensors, or shall it? Then the request must be made in the event loop."""
        return self.config.hold_tensors and terms.holds and may_refer(method, inputs, self.chain.entries, kept)

    # --- the parts of it, for those who carry the call themselves --------------------------------------------------------

    def forward_call(
        self, peer: PeerIDLike, terms: Terms, tensors: Sequence[torch.Tensor], rows: int, timeout_s: float | None
    ) -> Call:
        """What ``forward`` sends, if nothing is held."""
        header = make_header(self.chain, terms.native, timeout_s, metadata=self._metadata(peer, FORWARD))
        reply_bytes = _expected_bytes(self.chain.output_entries, rows, tensors, terms.native)
        return Call(FORWARD, self.uid, header, tensors, self._codecs, reply_bytes, self._output_codecs)

    def outputs(self, reply: Reply, rows: int, peer: PeerIDLike) -> list[torch.Tensor]:
        """What ``forward`` returns, checked."""
        outputs = self.chain.output_entries
        with Blaming(peer):
            try:
                validate(outputs, reply.tensors, rows=rows, what="the reply")
            except SchemaError as e:
                raise ProtocolError(f"the server's reply does not fit: {e.message}", peer=peer.to_base58()) from None
            self.check_finite(reply.tensors, outputs, peer)
            return list(reply.tensors)

    def backward_call(
        self,
        peer: PeerIDLike,
        terms: Terms,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        wants: tuple[bool, ...],
        request_ids: Sequence[bytes],
        timeout_s: float | None,
    ) -> Call:
        """What ``backward`` sends, if nothing is held."""
        grad_entries = self.chain.gradient_entries
        if not terms.native:  # stock hivemind wants a gradient for every output, integer ones included
            grad_entries = self.chain.output_entries
            grad_outputs = _stock_gradients(grad_entries, grad_outputs, _rows(self.chain.entries, inputs))
        metadata = self._metadata(peer, BACKWARD)
        header = make_header(self.chain, terms.native, timeout_s, wants, request_ids, metadata)
        codecs = (*self._codecs, *(entry.proto.compression for entry in grad_entries))
        tensors = [*inputs, *grad_outputs]
        reply_bytes = sum(t.nbytes for t, wanted in zip(inputs, wants) if wanted or not terms.native)
        return Call(BACKWARD, self.uid, header, tensors, codecs, reply_bytes, self._gradient_codecs)

    def _metadata(self, peer: PeerIDLike, method: str) -> Metadata:
        """What the caller's policy tells this server.

        :raises ConfigError: something that cannot be sent
        """
        tell = self.config.request_metadata
        if tell is None:
            return {}
        return check_metadata(tell(peer.to_base58(), method, tuple(block.uid for block in self.chain.blocks)))

    async def _send(
        self, peer: PeerIDLike, terms: Terms, call: Call, rows: int, kept: Kept | None, timeout_s: float | None
    ) -> Reply:
        try:
            with Blaming(peer):
                if not (self.config.hold_tensors and terms.holds):
                    return await self.transport.call(peer, call, timeout_s=timeout_s)
                referring = Referring.over(self.transport)
                return await referring.call(peer, call, self.chain.entries, kept=kept, timeout_s=timeout_s)
        except ExpertFailed as e:
            max_rows = None if terms.native else stock_max_rows(e.message)
            if max_rows is None or not 0 < max_rows < rows or not self.chain.mergeable:
                raise
            raise TooManyRows(e.message, max_rows=max_rows, peer=e.peer or peer.to_base58(), uid=e.uid) from None

    def _looked_through(self, reply: Reply, peer: PeerIDLike) -> int:
        """How many bytes a check of a reply reads."""
        with Blaming(peer):
            return sum(tensor.nbytes for tensor in reply.tensors) if self.config.detect_anomalies else 0

    def row_ranges(
        self, terms: Terms, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], rows: int
    ) -> list[tuple[int, int]]:
        """How to split a call that is larger than the server takes in one request.

        :raises SchemaError: it cannot be split
        """
        limit = terms.room(entries, tensors, rows)
        reply_bytes = sum(_known_bytes(entry.proto) for entry in self.chain.output_entries if entry.proto.batched)
        if reply_bytes and self.chain.mergeable:
            limit = min(limit, max(1, MAX_REPLY_BYTES // reply_bytes))
        if rows <= limit or rows <= 1:
            return [(0, rows)]
        if limit < 1 or not self.chain.mergeable:
            raise SchemaError(
                f"the call of {rows} rows is larger than the server takes ({terms.max_rows} rows, "
                f"{terms.max_bytes} bytes in one request), and it cannot be split by rows"
            )
        return even_ranges(rows, limit)

    def gradients(
        self, inputs: Sequence[torch.Tensor], wants: Sequence[bool], reply: Reply, peer: PeerIDLike
    ) -> Gradients:
        """What ``backward`` returns, checked."""
        with Blaming(peer):
            entries = self.chain.entries
            has_grad = (True,) * len(entries) if reply.header is None else reply.header.has_grad
            if has_grad is None or len(has_grad) != len(entries) or sum(has_grad) != len(reply.tensors):
                raise ProtocolError("the server's reply has not the gradients it says", peer=peer.to_base58())
            received = iter(reply.tensors)
            grads: Gradients = [next(received) if has else None for has in has_grad]
            for entry, tensor, grad, wanted in zip(entries, inputs, grads, wants):
                if grad is None and wanted:
                    raise ProtocolError(f"the server sent no gradient of {entry.path}", peer=peer.to_base58())
                if grad is not None and (grad.shape != tensor.shape or grad.dtype != tensor.dtype):
                    raise ProtocolError(
                        f"the gradient of {entry.path} is {grad.dtype} {tuple(grad.shape)}, its tensor {tuple(tensor.shape)}",
                        peer=peer.to_base58(),
                    )
                if grad is not None and wanted:
                    self.check_finite([grad], [entry], peer)
            return [grad if wanted else None for grad, wanted in zip(grads, wants)]

    def check_finite(
        self, tensors: Sequence[torch.Tensor], entries: Sequence[Entry], peer: PeerIDLike | None = None
    ) -> None:
        """Refuse nan and inf, if anomalies are to be detected.

        :raises NonFiniteError: naming the tensor
        """
        if not self.config.detect_anomalies:
            return
        for tensor, entry in zip(tensors, entries):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                name = None if peer is None else peer.to_base58()
                raise NonFiniteError(f"{entry.path} has nan/inf values", peer=name, uid=self.uid)


# --- rows --------------------------------------------------------------------------------------------------------------


def even_ranges(rows: int, limit: int) -> list[tuple[int, int]]:
    """Ranges of at most ``limit`` rows each, as few and as equal as possible; one, empty, for no rows."""
    pieces = max(1, -(-rows // limit))
    return list(itertools.pairwise(rows * i // pieces for i in range(pieces + 1)))


def join_outputs(pieces: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Outputs of ranges of rows put together; with several ranges all outputs are batched."""
    return list(pieces[0]) if len(pieces) == 1 else [torch.cat(parts) for parts in zip(*pieces)]


def join_gradients(entries: Sequence[Entry], pieces: Sequence[Gradients]) -> Gradients:
    """Gradients of ranges of rows put together: rows joined, what is global to the call summed."""
    if len(pieces) == 1:
        return pieces[0]
    joined: Gradients = []
    for entry, parts in zip(entries, zip(*pieces)):
        tensors = [part for part in parts if part is not None]
        if not tensors:
            joined.append(None)
        else:
            joined.append(torch.cat(tensors) if entry.proto.batched else torch.stack(tensors).sum(0))
    return joined


def ranges_of(
    entries: Sequence[Entry], tensors: Sequence[torch.Tensor], ranges: Sequence[tuple[int, int]]
) -> list[list[torch.Tensor]]:
    """The tensors of each range of rows."""
    return [list(tensors)] if len(ranges) == 1 else [select_rows(entries, tensors, a, b) for a, b in ranges]


# --- helpers -------------------------------------------------------------------------------------------------------------


async def in_parallel(run: Callable[[Item], Coroutine[Any, Any, T]], items: Sequence[Item]) -> list[T]:
    """Results for all items, at least one, a bounded number at one time; when one fails, the others do not go on for nobody."""
    if len(items) == 1:
        return [await run(items[0])]  # without the cost of a task
    room = asyncio.Semaphore(MAX_PARALLEL)

    async def one(item: Item) -> T:
        async with room:
            return await run(item)

    tasks = [asyncio.ensure_future(one(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def off_loop(size_bytes: int, function: Callable[..., T], *args: Any) -> T:
    """The result of a function that reads this many bytes; of many in a thread, so that others need not wait."""
    if size_bytes <= _IN_LOOP_BYTES:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *args))


async def by_rows(
    send: Callable[[Sequence[torch.Tensor], int, int], Coroutine[Any, Any, list[Any]]],
    entries: Sequence[Entry],
    tensors: Sequence[torch.Tensor],
    ranges: Sequence[tuple[int, int]],
    join: Callable[[Sequence[list[Any]]], list[Any]],
) -> list[Any]:
    """Send ranges of rows, and join what comes back. Each is split again if a stock server says that it takes fewer.

    :param send: tensors, and which rows these are: from, to
    :param entries: of the tensors
    """

    async def one(part: tuple[list[torch.Tensor], tuple[int, int]]) -> list[Any]:
        own, (start, end) = part
        try:
            return await send(own, start, end)
        except TooManyRows as e:
            smaller = even_ranges(end - start, e.max_rows)
            shifted = [(start + a, start + b) for a, b in smaller]
            return await joined(list(zip(ranges_of(entries, own, smaller), shifted)))

    async def joined(parts: Sequence[tuple[list[torch.Tensor], tuple[int, int]]]) -> list[Any]:
        pieces = await in_parallel(one, parts)
        if len(pieces) == 1:
            return pieces[0]
        size_bytes = sum(tensor.nbytes for piece in pieces for tensor in piece if tensor is not None)
        return await off_loop(size_bytes, join, pieces)

    return await joined(list(zip(ranges_of(entries, tensors, ranges), ranges)))


def stock_max_rows(message: str) -> int | None:
    """What a stock server says it takes in one request; None: it says something else."""
    found = _STOCK_MAX_ROWS.search(message)
    return None if found is None else int(found[1])


def _rows(entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> int:
    return count_rows(entries, [tensor.shape for tensor in tensors])


def _known_bytes(proto: TensorProto) -> int:
    """Of one row, or of a whole tensor, as far as its lengths are known."""
    return math.prod(size for size in proto.sizes if size is not None) * proto.itemsize


def _expected_bytes(outputs: Sequence[Entry], rows: int, inputs: Sequence[torch.Tensor], native: bool) -> int:
    """About how large the outputs will be; unknown lengths count as large as the largest input, or, to a stock server,
    which cannot say "too large for unary", as too large."""
    total = 0
    for entry in outputs:
        size = _known_bytes(entry.proto) * (rows if entry.proto.batched else 1)
        if None in entry.proto.sizes:
            size = max([size, *(tensor.nbytes for tensor in inputs)] + ([] if native else [_UNKNOWN_BYTES]))
        total += size
    return total


def _stock_gradients(outputs: Sequence[Entry], grads: Sequence[torch.Tensor], rows: int) -> list[torch.Tensor]:
    given = iter(grads)
    result = []
    for _, proto in outputs:
        if proto.is_floating_point:
            result.append(next(given))
        else:
            result.append(torch.zeros([rows, *(size or 0 for size in proto.sizes)], dtype=proto.dtype))
    return result
