"""One expert, asynchronously: what a forward or backward takes in requests. Owns: schema checks on the client, splitting
of oversized calls, retries over an expert's servers, deadlines, checks of what came back.

Shared by RemoteExpert, the mixtures and the sequences. Must not know: autograd, devices other than CPU, or how a server was
chosen. Everything runs in the client's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from moe.config import ClientConfig
from moe.errors import (
    CallTimeout,
    ExpertNotFound,
    LifecycleError,
    MoEError,
    NonFiniteError,
    ProtocolError,
    SchemaError,
)
from moe.expert_uid import PeerIDLike
from moe.schema import Entry, ExpertSchema, count_rows, gradient_entries, select_rows, validate
from moe.transport.base import BACKWARD, FORWARD, Budget, Call, ExpertTransport, Reply
from moe.wire.messages import ExpertDescription, RequestHeader, new_request_id

logger = logging.getLogger(__name__)

T = TypeVar("T")
Gradients = list["torch.Tensor | None"]

_REQUEST_FILL = 0.95  # of a server's max_request_bytes; the rest is headroom for codecs


class ExpertCaller:
    """Calls one expert, hosted by one or several servers.

    :param uid: the expert
    :param peers: servers that host it, best first
    :param transport: how calls travel
    :param config: deadlines and retries
    """

    def __init__(self, uid: str, peers: Sequence[PeerIDLike], transport: ExpertTransport, config: ClientConfig):
        if not peers:
            raise LifecycleError(f"expert {uid} needs at least one server to be called")
        self.uid, self.peers, self.transport, self.config = uid, list(peers), transport, config
        self._described: tuple[ExpertDescription, ExpertSchema] | None = None
        self._describing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"ExpertCaller({self.uid!r} on {len(self.peers)} servers)"

    # --- what the expert takes ---------------------------------------------------------------------------------------

    @property
    def known(self) -> tuple[ExpertDescription, ExpertSchema] | None:
        """The expert's description and schema, if they were asked for before."""
        return self._described

    def forget_description(self) -> None:
        """Ask again next time."""
        self._described = None

    async def describe(self, budget: Budget) -> tuple[ExpertDescription, ExpertSchema]:
        """The expert's description and schema; asked for once."""
        if self._described is None:
            async with self._describing:
                if self._described is None:
                    description = await self._attempts(self._ask_description, self.config.connect_timeout_s, budget)
                    self._described = description, description.expert_schema()
        return self._described

    async def _ask_description(self, peer: PeerIDLike, timeout_s: float | None) -> ExpertDescription:
        return await self.transport.info(peer, self.uid, timeout_s=timeout_s)

    # --- calls ---------------------------------------------------------------------------------------------------------

    async def forward(
        self, tensors: Sequence[torch.Tensor], present: tuple[str, ...], budget: Budget
    ) -> list[torch.Tensor]:
        """Flat outputs for flat inputs that fit the schema; CPU tensors.

        :raises SchemaError: inputs that do not fit (before anything is sent)
        :raises MoEError: no server could answer
        """
        description, schema = await self.describe(budget)
        with self._saying_whose():
            entries = schema.input_entries(present)
            rows = validate(entries, tensors)
            self._check_finite(tensors, entries)
            ranges = self._row_ranges(description, schema, entries, tensors, rows, schema.output_entries)
        if len(ranges) == 1:
            return await self._forward_once(description, schema, tensors, present, rows, budget)
        parts = await _all_or_cancel(
            self._forward_once(description, schema, select_rows(entries, tensors, a, b), present, b - a, budget)
            for a, b in ranges
        )
        return [torch.cat(pieces) for pieces in zip(*parts)]

    async def backward(
        self,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        present: tuple[str, ...],
        wants_grad: Sequence[bool],
        budget: Budget,
    ) -> Gradients:
        """Gradients of flat inputs, given those of the floating-point outputs; trains the expert, once.

        :param wants_grad: one flag per input
        :returns: one gradient or None per input
        :raises SchemaError: tensors that do not fit (before anything is sent)
        :raises MoEError: no server could answer
        """
        description, schema = await self.describe(budget)
        with self._saying_whose():
            entries = schema.input_entries(present)
            rows = validate(entries, inputs)
            grad_entries = gradient_entries(schema.output_entries)
            validate(grad_entries, grad_outputs, rows=rows, what="grad_outputs")
            self._check_finite(grad_outputs, grad_entries)
            every, tensors = (*entries, *grad_entries), [*inputs, *grad_outputs]
            ranges = self._row_ranges(description, schema, every, tensors, rows, entries)
        wants = tuple(wants_grad)
        if len(ranges) == 1:
            return await self._backward_once(description, schema, tensors, len(entries), present, wants, budget)
        parts = await _all_or_cancel(
            self._backward_once(
                description, schema, select_rows(every, tensors, a, b), len(entries), present, wants, budget
            )
            for a, b in ranges
        )
        return [_join_gradients(entry, pieces) for entry, pieces in zip(entries, zip(*parts))]

    @contextlib.contextmanager
    def _saying_whose(self) -> Iterator[None]:
        """Name the expert in errors about its schema."""
        try:
            yield
        except SchemaError as e:
            e.uid = e.uid or self.uid
            raise

    async def _forward_once(
        self,
        description: ExpertDescription,
        schema: ExpertSchema,
        tensors: Sequence[torch.Tensor],
        present: tuple[str, ...],
        rows: int,
        budget: Budget,
    ) -> list[torch.Tensor]:
        entries, outputs = schema.input_entries(present), schema.output_entries
        header = RequestHeader(present=present) if description.native else None
        codecs = [entry.proto.compression for entry in entries]
        reply_bytes = _expected_bytes(outputs, rows, tensors, description.native)

        async def attempt(peer: PeerIDLike, timeout_s: float | None) -> list[torch.Tensor]:
            call = Call(FORWARD, self.uid, _timed(header, timeout_s), tensors, codecs, reply_bytes)
            reply = await self.transport.call(peer, call, timeout_s=timeout_s)
            self._check_reply(outputs, reply.tensors, rows, peer)
            return list(reply.tensors)

        return await self._attempts(attempt, self.config.request_timeout_s, budget)

    async def _backward_once(
        self,
        description: ExpertDescription,
        schema: ExpertSchema,
        tensors: Sequence[torch.Tensor],
        count: int,
        present: tuple[str, ...],
        wants: tuple[bool, ...],
        budget: Budget,
    ) -> Gradients:
        entries = schema.input_entries(present)
        native = description.native
        header = RequestHeader(present=present, wants_grad=wants, request_id=new_request_id()) if native else None
        if not native:  # stock hivemind wants a gradient for every output, integer ones included
            tensors = [
                *tensors[:count],
                *_stock_gradients(schema, tensors[count:], count_rows(entries, _shapes(tensors))),
            ]
            codecs = [entry.proto.compression for entry in (*entries, *schema.output_entries)]
        else:
            codecs = [entry.proto.compression for entry in (*entries, *gradient_entries(schema.output_entries))]
        reply_bytes = sum(t.nbytes for t, wanted in zip(tensors, wants) if wanted or not native)

        async def attempt(peer: PeerIDLike, timeout_s: float | None) -> Gradients:
            call = Call(BACKWARD, self.uid, _timed(header, timeout_s), tensors, codecs, reply_bytes)
            reply = await self.transport.call(peer, call, timeout_s=timeout_s)
            return self._gradients(entries, tensors[:count], wants, reply, peer)

        return await self._attempts(attempt, self.config.request_timeout_s, budget)

    def _row_ranges(
        self,
        description: ExpertDescription,
        schema: ExpertSchema,
        entries: Sequence[Entry],
        tensors: Sequence[torch.Tensor],
        rows: int,
        replies: Sequence[Entry],
    ) -> list[tuple[int, int]]:
        """How to split a call that is larger than the server takes in one request."""
        shared = sum(t.nbytes for entry, t in zip(entries, tensors) if not entry.proto.batched)
        per_row = sum(t.nbytes for entry, t in zip(entries, tensors) if entry.proto.batched) / max(1, rows)
        room = _REQUEST_FILL * description.max_request_bytes - shared
        limit = description.max_batch_size
        if per_row > 0:
            limit = min(limit, int(room // per_row))
        if rows <= limit or rows <= 1:
            return [(0, rows)]
        if limit < 1 or not schema.mergeable:
            raise SchemaError(
                f"the call of {rows} rows is larger than the server takes ({description.max_batch_size} rows, "
                f"{description.max_request_bytes} bytes in one request), and it cannot be split by rows"
            )
        pieces = -(-rows // limit)
        bounds = [rows * i // pieces for i in range(pieces + 1)]
        return list(itertools.pairwise(bounds))

    # --- what came back -------------------------------------------------------------------------------------------------

    def _check_reply(
        self, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], rows: int, peer: PeerIDLike
    ) -> None:
        try:
            validate(entries, tensors, rows=rows, what="the reply")
        except SchemaError as e:
            raise ProtocolError(f"the server's reply does not fit: {e.message}", peer=peer.to_base58()) from None
        self._check_finite(tensors, entries, peer)

    def _gradients(
        self,
        entries: Sequence[Entry],
        inputs: Sequence[torch.Tensor],
        wants: Sequence[bool],
        reply: Reply,
        peer: PeerIDLike,
    ) -> Gradients:
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
                self._check_finite([grad], [entry], peer)
        return [grad if wanted else None for grad, wanted in zip(grads, wants)]

    def _check_finite(
        self, tensors: Sequence[torch.Tensor], entries: Sequence[Entry], peer: PeerIDLike | None = None
    ) -> None:
        if not self.config.detect_anomalies:
            return
        for tensor, entry in zip(tensors, entries):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                name = None if peer is None else peer.to_base58()
                raise NonFiniteError(f"{entry.path} has nan/inf values", peer=name, uid=self.uid)

    # --- attempts --------------------------------------------------------------------------------------------------------

    async def _attempts(
        self, attempt: Callable[[PeerIDLike, float | None], Awaitable[T]], timeout_s: float | None, budget: Budget
    ) -> T:
        """Try servers in turn until one answers, an error is final, or retries or time are used up."""
        failures: list[str] = []
        for number in range(self.config.max_retries + 1):
            peer = self.peers[0]
            try:
                return await attempt(peer, budget.left_s(timeout_s))
            except MoEError as e:
                e.uid, e.peer = e.uid or self.uid, e.peer or peer.to_base58()
                failures.append(f"{e.peer[-8:]}: {type(e).__name__}: {e.message}")
                elsewhere = len(self.peers) > 1 and isinstance(e, (ProtocolError, ExpertNotFound))
                if not (e.retryable or elsewhere) or number == self.config.max_retries:
                    raise _with_history(e, failures) from e.__cause__
                delay_s = retry_delay_s(number, self.config, other_server=len(self.peers) > 1)
                left_s = _left_or_raise(budget, e, failures)
                if left_s is not None and left_s <= delay_s:
                    raise _with_history(e, failures) from None
                logger.debug("expert %s: attempt %d failed: %r", self.uid, number, e)
                if self.peers[0] is peer:  # else another part of a split call has done so
                    self.peers.append(self.peers.pop(0))
                await asyncio.sleep(delay_s)
        raise AssertionError("unreachable")


def retry_delay_s(attempt: int, config: ClientConfig, *, other_server: bool) -> float:
    """Wait before attempt ``attempt + 1``: none for a first try of another server, then doubling."""
    if attempt == 0 and other_server:
        return 0.0
    return min(config.min_backoff_s * 2.0 ** min(attempt, 64), config.max_backoff_s)


async def _all_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all; when one fails, the others do not go on for nobody."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _left_or_raise(budget: Budget, error: MoEError, failures: list[str]) -> float | None:
    try:
        return budget.left_s()
    except CallTimeout:
        raise _with_history(error, failures) from None


def _with_history(error: MoEError, failures: list[str]) -> MoEError:
    if len(failures) < 2:
        return error
    return type(error)(f"{error.message} (attempts: {'; '.join(failures)})", peer=error.peer, uid=error.uid)


def _timed(header: RequestHeader | None, timeout_s: float | None) -> RequestHeader | None:
    if header is None or timeout_s is None:
        return header
    return RequestHeader(
        request_id=header.request_id, present=header.present, wants_grad=header.wants_grad, time_left_s=timeout_s
    )


def _shapes(tensors: Sequence[torch.Tensor]) -> list[Sequence[int]]:
    return [tensor.shape for tensor in tensors]


def _expected_bytes(outputs: Sequence[Entry], rows: int, inputs: Sequence[torch.Tensor], native: bool) -> int:
    """About how large the outputs will be; unknown lengths count as large as the largest input, or, to a stock server,
    which cannot say "too large for unary", as too large."""
    total = 0
    for entry in outputs:
        known = math.prod(size for size in entry.proto.sizes if size is not None) * entry.proto.itemsize
        size = known * (rows if entry.proto.batched else 1)
        if None in entry.proto.sizes:
            size = max([size, *(tensor.nbytes for tensor in inputs)]) if native else 2**40
        total += size
    return total


def _stock_gradients(schema: ExpertSchema, grads: Sequence[torch.Tensor], rows: int) -> list[torch.Tensor]:
    given = iter(grads)
    result = []
    for _, proto in schema.output_entries:
        if proto.is_floating_point:
            result.append(next(given))
        else:
            result.append(torch.zeros([rows, *(size or 0 for size in proto.sizes)], dtype=proto.dtype))
    return result


def _join_gradients(entry: Entry, pieces: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Gradients of row ranges put together: rows joined; what is global to the call summed."""
    tensors = [piece for piece in pieces if piece is not None]
    if not tensors:
        return None
    return torch.cat(tensors) if entry.proto.batched else torch.stack(tensors).sum(0)
