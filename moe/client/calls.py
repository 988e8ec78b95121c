"""One expert, asynchronously: what a forward or backward takes in requests. Owns: schema checks on the client, retries over an
expert's servers, deadlines.

Shared by RemoteExpert and the mixtures. Must not know: autograd, devices other than CPU, or how a server was
chosen. Everything runs in the client's event loop, but for what says ``blocking``: that is for threads that wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from moe.chains import Chain
from moe.client.references import Kept, KeptRows
from moe.client.requests import Gradients, Request, Terms, all_or_cancel, join_gradients, join_outputs, ranges_of
from moe.config import ClientConfig
from moe.errors import CallTimeout, ExpertNotFound, LifecycleError, MoEError, ProtocolError, SchemaError
from moe.expert_uid import PeerIDLike
from moe.schema import ExpertSchema, validate
from moe.transport.base import BACKWARD, FORWARD, BlockingCalls, Budget, CallBlocking, ExpertTransport
from moe.transport.event_loop import client_loop
from moe.wire.messages import ExpertDescription, new_request_id

logger = logging.getLogger(__name__)

T = TypeVar("T")
Described = tuple[ExpertDescription, ExpertSchema]

MAX_REQUESTS = 256  # kept, one for each subset of the optional kwargs that a caller gives; ours


class Failed(NamedTuple):
    """A first attempt that has failed.

    :ivar request_id: of a backward
    """

    peer: PeerIDLike
    error: MoEError
    request_id: bytes = b""


class _Prepared(NamedTuple):
    """What a call needs, found out before anything is sent.

    :ivar ranges: of rows, one for each request
    """

    request: Request
    terms: Terms
    ranges: list[tuple[int, int]]


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
        self._blocking = transport if isinstance(transport, BlockingCalls) else None
        self._described: Described | None = None
        self._requests: dict[tuple[str, ...], tuple[Described, Request, Terms]] = {}  # by optional kwargs given
        self._describing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"ExpertCaller({self.uid!r} on {len(self.peers)} servers)"

    # --- what the expert takes ---------------------------------------------------------------------------------------

    @property
    def known(self) -> Described | None:
        """The expert's description and schema, if they were asked for before."""
        return self._described

    def forget_description(self) -> None:
        """Ask again next time."""
        self._described = None

    async def describe(self, budget: Budget) -> Described:
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

    def forward_blocking(
        self, tensors: Sequence[torch.Tensor], present: tuple[str, ...], budget: Budget, kept: KeptRows | None = None
    ) -> list[torch.Tensor]:
        """``forward`` by a thread that waits for it. What takes one request is sent by that thread itself, where the
        transport can do that; the event loop does the rest: retries, splitting, what has to be asked for first."""
        peer, failed = self.peers[0], None
        carry = self._carrier(peer)
        if carry is not None:
            request, terms, ranges = self._prepare_forward(tensors, present)
            note = None if kept is None else kept.setdefault(ranges[0], Kept())
            if len(ranges) == 1 and not request.may_refer(terms, FORWARD, tensors, note):
                try:
                    timeout_s = budget.left_s(self.config.request_timeout_s)
                    ((start, end),) = ranges
                    call = request.forward_call(peer, terms, tensors, end - start, timeout_s)
                    return request.outputs(carry(call, timeout_s), end - start, peer)
                except MoEError as e:
                    failed = Failed(peer, e)
        return client_loop().run(self.forward(tensors, present, budget, kept, failed))

    async def forward(
        self,
        tensors: Sequence[torch.Tensor],
        present: tuple[str, ...],
        budget: Budget,
        kept: KeptRows | None = None,
        failed: Failed | None = None,
    ) -> list[torch.Tensor]:
        """Flat outputs for flat inputs that fit the schema; CPU tensors.

        :param kept: where to note which servers keep the inputs for the backward; None: they need not
        :param failed: the first attempt, if it was made before
        :raises SchemaError: inputs that do not fit (before anything is sent)
        :raises MoEError: no server could answer
        """
        await self.describe(budget)
        request, terms, ranges = self._prepare_forward(tensors, present)

        def send(part: list[torch.Tensor], start: int, end: int) -> Coroutine[Any, Any, list[torch.Tensor]]:
            note = None if kept is None else kept.setdefault((start, end), Kept())
            return self._attempts(
                lambda peer, timeout_s: request.forward(peer, terms, part, end - start, timeout_s, note),
                self.config.request_timeout_s,
                budget,
                failed,
            )

        parts = ranges_of(request.chain.entries, tensors, ranges)
        return join_outputs(await all_or_cancel(send(part, *bounds) for part, bounds in zip(parts, ranges)))

    def backward_blocking(
        self,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        present: tuple[str, ...],
        wants_grad: Sequence[bool],
        budget: Budget,
        kept: KeptRows | None = None,
    ) -> Gradients:
        """``backward`` by a thread that waits for it; see ``forward_blocking``."""
        peer, failed = self.peers[0], None
        carry = self._carrier(peer)
        if carry is not None:
            request, terms, ranges = self._prepare_backward(inputs, grad_outputs, present)
            note = None if kept is None else kept.get(ranges[0])
            if len(ranges) == 1 and not request.may_refer(terms, BACKWARD, inputs, note):
                wants, request_id = tuple(wants_grad), new_request_id()
                try:
                    timeout_s = budget.left_s(self.config.request_timeout_s)
                    call = request.backward_call(peer, terms, inputs, grad_outputs, wants, [request_id], timeout_s)
                    return request.gradients(inputs, wants, carry(call, timeout_s), peer)
                except MoEError as e:
                    failed = Failed(peer, e, request_id)
        return client_loop().run(self.backward(inputs, grad_outputs, present, wants_grad, budget, kept, failed))

    async def backward(
        self,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        present: tuple[str, ...],
        wants_grad: Sequence[bool],
        budget: Budget,
        kept: KeptRows | None = None,
        failed: Failed | None = None,
    ) -> Gradients:
        """Gradients of flat inputs, given those of the floating-point outputs; trains the expert, once.

        :param wants_grad: one flag per input
        :param kept: what the forward of the same inputs has noted
        :param failed: the first attempt, if it was made before
        :returns: one gradient or None per input
        :raises SchemaError: tensors that do not fit (before anything is sent)
        :raises MoEError: no server could answer
        """
        await self.describe(budget)
        request, terms, ranges = self._prepare_backward(inputs, grad_outputs, present)
        wants, count = tuple(wants_grad), len(inputs)

        def send(part: list[torch.Tensor], bounds: tuple[int, int]) -> Coroutine[Any, Any, Gradients]:
            request_id = new_request_id() if failed is None else failed.request_id  # one for all attempts
            note = None if kept is None else kept.get(bounds)
            return self._attempts(
                lambda peer, timeout_s: request.backward(
                    peer, terms, part[:count], part[count:], wants, [request_id], timeout_s, note
                ),
                self.config.request_timeout_s,
                budget,
                failed,
            )

        entries = (*request.chain.entries, *request.chain.gradient_entries)
        parts = ranges_of(entries, [*inputs, *grad_outputs], ranges)
        return join_gradients(request.chain.entries, await all_or_cancel(map(send, parts, ranges)))

    # --- before anything is sent -----------------------------------------------------------------------------------------

    def _carrier(self, peer: PeerIDLike) -> CallBlocking | None:
        """What carries a call of the thread that asks; None if the event loop has to."""
        if self._blocking is None or self._described is None:
            return None
        return self._blocking.blocking(peer)

    def _prepare_forward(self, tensors: Sequence[torch.Tensor], present: tuple[str, ...]) -> _Prepared:
        request, terms = self._request(present)
        entries = request.chain.entries
        try:
            rows = validate(entries, tensors)
            request.check_finite(tensors, entries)
            return _Prepared(request, terms, request.row_ranges(terms, entries, tensors, rows))
        except SchemaError as e:
            raise self._saying_whose(e) from None

    def _prepare_backward(
        self, inputs: Sequence[torch.Tensor], grad_outputs: Sequence[torch.Tensor], present: tuple[str, ...]
    ) -> _Prepared:
        request, terms = self._request(present)
        entries, grad_entries = request.chain.entries, request.chain.gradient_entries
        try:
            rows = validate(entries, inputs)
            validate(grad_entries, grad_outputs, rows=rows, what="grad_outputs")
            request.check_finite(grad_outputs, grad_entries)
            every, tensors = (*entries, *grad_entries), [*inputs, *grad_outputs]
            return _Prepared(request, terms, request.row_ranges(terms, every, tensors, rows))
        except SchemaError as e:
            raise self._saying_whose(e) from None

    def _request(self, present: tuple[str, ...]) -> tuple[Request, Terms]:
        """What a call with these optional kwargs needs; put together once."""
        described = self._described
        assert described is not None
        known = self._requests.get(present)
        if known is None or known[0] is not described:
            description, schema = described
            request = Request(self.transport, Chain.single(self.uid, schema, present), self.config)
            known = described, request, Terms.of([description])
            if len(self._requests) >= MAX_REQUESTS:
                self._requests.clear()
            self._requests[present] = known
        return known[1], known[2]

    def _saying_whose(self, error: SchemaError) -> SchemaError:
        """Name the expert in an error about its schema."""
        error.uid = error.uid or self.uid
        return error

    # --- attempts --------------------------------------------------------------------------------------------------------

    async def _attempts(
        self,
        attempt: Callable[[PeerIDLike, float | None], Awaitable[T]],
        timeout_s: float | None,
        budget: Budget,
        failed: Failed | None = None,
    ) -> T:
        """Try servers in turn until one answers, an error is final, or retries or time are used up.

        :param failed: the first attempt, if it was made before
        """
        failures: list[str] = []
        for number in range(self.config.max_retries + 1):
            peer = self.peers[0] if failed is None or number else failed.peer
            try:
                if failed is not None and number == 0:
                    raise failed.error
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


def _left_or_raise(budget: Budget, error: MoEError, failures: list[str]) -> float | None:
    try:
        return budget.left_s()
    except CallTimeout:
        raise _with_history(error, failures) from None


def _with_history(error: MoEError, failures: list[str]) -> MoEError:
    if len(failures) < 2:
        return error
    return type(error)(f"{error.message} (attempts: {'; '.join(failures)})", peer=error.peer, uid=error.uid)
