"""One expert, asynchronously: what a forward or backward takes in requests. Owns: schema checks on the client, retries over an
expert's servers, deadlines.

Shared by RemoteExpert and the mixtures. Must not know: autograd, devices other than CPU, or how a server was
chosen. Everything runs in the client's event loop, but for what says ``blocking``: that is for threads that wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch

from moe.chains import Chain
from moe.client.loop_lock import LoopLock
from moe.client.references import Kept, KeptRows
from moe.client.requests import (
    Blaming,
    Described,
    Gradients,
    Request,
    Terms,
    TooManyRows,
    by_rows,
    describe_at,
    join_gradients,
    join_outputs,
    off_loop,
)
from moe.config import ClientConfig
from moe.errors import (
    CallTimeout,
    ConfigError,
    LifecycleError,
    MoEError,
    RemoteSchemaError,
    SchemaError,
    Unsupported,
)
from moe.expert_uid import PeerIDLike
from moe.schema import validate
from moe.transport.base import BACKWARD, FORWARD, BlockingCalls, Budget, CallBlocking, ExpertTransport
from moe.transport.event_loop import client_loop
from moe.wire.messages import new_request_id

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_TOLD = 8  # attempts in a message
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
        self.uid, self.transport, self.config = uid, transport, config
        self.peers: Sequence[PeerIDLike] = tuple(peers)  # never changed, only replaced: threads read it
        self._blocking = transport if isinstance(transport, BlockingCalls) else None
        self._described: Described | None = None
        self._requests: dict[tuple[str, ...], tuple[Described, Request, Terms]] = {}  # by optional kwargs given
        self._describing = LoopLock()

    def __repr__(self) -> str:
        return f"ExpertCaller({self.uid!r} on {len(self.peers)} servers)"

    def __deepcopy__(self, memo: object) -> ExpertCaller:
        """Another one, with the same transport."""
        copied = ExpertCaller(self.uid, self.peers, self.transport, self.config)
        copied._described = self._described
        return copied

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
        described = self._described
        if described is None:
            async with self._describing.held(budget, f"info of {self.uid}"):
                described = self._described
                if described is None:
                    described = await self._attempts(self._ask_description, self.config.connect_timeout_s, budget)
                    self._described = described
        return described

    async def describe_otherwise(self, known: Described, budget: Budget) -> Described | None:
        """What another server tells, if it tells something else; from then on it is asked first. For when nobody can call the
        expert as it was described: the server that has told may be the one that is wrong.

        :param known: what was told
        """
        for peer in self.peers[: self.config.max_retries + 1]:
            try:
                described = await self._ask_description(peer, budget.left_s(self.config.connect_timeout_s))
            except MoEError as e:
                logger.debug("expert %s: no other description: %r", self.uid, e)
                continue
            if described[0] != known[0]:
                self._described = described
                self.peers = (peer, *(other for other in self.peers if other is not peer))
                return described
        return None

    async def _ask_description(self, peer: PeerIDLike, timeout_s: float | None) -> Described:
        return await describe_at(self.transport, peer, self.uid, timeout_s)

    # --- calls ---------------------------------------------------------------------------------------------------------

    def forward_blocking(
        self,
        tensors: Sequence[torch.Tensor],
        present: tuple[str, ...],
        budget: Budget,
        kept: KeptRows | None = None,
        described: Described | None = None,
    ) -> list[torch.Tensor]:
        """``forward`` by a thread that waits for it. What takes one request is sent by that thread itself, where the
        transport can do that; the event loop does the rest: retries, splitting, what has to be asked for first."""
        peer, failed = self.peers[0], None
        described = described or self._described
        carry = self._carrier(peer)
        if carry is not None and described is not None:
            request, terms, ranges = self._prepare_forward(described, tensors, present)
            note = None if kept is None else kept.setdefault(ranges[0], Kept())
            if len(ranges) == 1 and not request.may_refer(terms, FORWARD, tensors, note):
                ((start, end),) = ranges
                try:
                    timeout_s = budget.left_s(self.config.request_timeout_s)
                    call = request.forward_call(peer, terms, tensors, end - start, timeout_s)
                    with Blaming(peer):
                        reply = carry(call, timeout_s)
                    return request.outputs(reply, end - start, peer)
                except MoEError as e:
                    failed = Failed(peer, e)
        return client_loop().run(self.forward(tensors, present, budget, kept, failed, described))

    async def forward(
        self,
        tensors: Sequence[torch.Tensor],
        present: tuple[str, ...],
        budget: Budget,
        kept: KeptRows | None = None,
        failed: Failed | None = None,
        described: Described | None = None,
        *,
        again: bool = False,
    ) -> list[torch.Tensor]:
        """Flat outputs for flat inputs that fit the schema; CPU tensors.

        :param kept: where to note which servers keep the inputs for the backward; None: they need not
        :param failed: the first attempt, if it was made before
        :param described: what it is taken to take; None: what it says that it takes
        :param again: a server has refused before what fits what was known
        :raises SchemaError: inputs that do not fit (before anything is sent)
        :raises MoEError: no server could answer
        """
        described = described or await self.describe(budget)
        looked_at = self._looked_through(tensors)
        request, terms, ranges = await off_loop(looked_at, self._prepare_forward, described, tensors, present)

        def send(part: Sequence[torch.Tensor], start: int, end: int) -> Awaitable[list[torch.Tensor]]:
            note = None if kept is None else kept.setdefault((start, end), Kept())
            return self._attempts(
                lambda peer, timeout_s: request.forward(peer, terms, part, end - start, timeout_s, note),
                self.config.request_timeout_s,
                budget,
                failed,
            )

        try:
            return await by_rows(self._learning(send), request.chain.entries, tensors, ranges, join_outputs)
        except RemoteSchemaError:
            fresh = await self._described_now(described, budget)
            if fresh is None or len(ranges) > 1:
                raise
            self._prepare_forward(fresh, tensors, present)
            if fresh[1] != described[1] or again:
                raise
            return await self.forward(tensors, present, budget, kept, None, fresh, again=True)

    def backward_blocking(
        self,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        present: tuple[str, ...],
        wants_grad: Sequence[bool],
        budget: Budget,
        kept: KeptRows | None = None,
        described: Described | None = None,
    ) -> Gradients:
        """``backward`` by a thread that waits for it; see ``forward_blocking``."""
        peer, failed = self.peers[0], None
        described = described or self._described
        carry = self._carrier(peer)
        if carry is not None and described is not None:
            request, terms, ranges = self._prepare_backward(described, inputs, grad_outputs, present)
            note = None if kept is None else kept.get(ranges[0])
            if len(ranges) == 1 and not request.may_refer(terms, BACKWARD, inputs, note):
                wants, request_id = tuple(wants_grad), new_request_id()
                try:
                    timeout_s = budget.left_s(self.config.request_timeout_s)
                    call = request.backward_call(peer, terms, inputs, grad_outputs, wants, [request_id], timeout_s)
                    with Blaming(peer):
                        reply = carry(call, timeout_s)
                    return request.gradients(inputs, wants, reply, peer)
                except MoEError as e:
                    failed = Failed(peer, e, request_id)
        run = self.backward(inputs, grad_outputs, present, wants_grad, budget, kept, failed, described)
        return client_loop().run(run)

    async def backward(
        self,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        present: tuple[str, ...],
        wants_grad: Sequence[bool],
        budget: Budget,
        kept: KeptRows | None = None,
        failed: Failed | None = None,
        described: Described | None = None,
        *,
        again: bool = False,
    ) -> Gradients:
        """Gradients of flat inputs, given those of the floating-point outputs; trains the expert, once.

        :param wants_grad: one flag per input
        :param kept: what the forward of the same inputs has noted
        :param failed: the first attempt, if it was made before
        :param described: see ``forward``
        :param again: see ``forward``
        :returns: one gradient or None per input
        :raises SchemaError: tensors that do not fit (before anything is sent)
        :raises MoEError: no server could answer
        """
        described = described or await self.describe(budget)
        looked_at = self._looked_through(grad_outputs)
        prepare, wants, count = self._prepare_backward, tuple(wants_grad), len(inputs)
        request, terms, ranges = await off_loop(looked_at, prepare, described, inputs, grad_outputs, present)

        def send(part: Sequence[torch.Tensor], start: int, end: int) -> Awaitable[Gradients]:
            request_id = new_request_id() if failed is None else failed.request_id  # one for all attempts
            note = None if kept is None else kept.get((start, end))
            return self._attempts(
                lambda peer, timeout_s: request.backward(
                    peer, terms, part[:count], part[count:], wants, [request_id], timeout_s, note
                ),
                self.config.request_timeout_s,
                budget,
                failed,
            )

        entries = request.chain.entries
        every, tensors = (*entries, *request.chain.gradient_entries), [*inputs, *grad_outputs]

        def join(pieces: Sequence[Gradients]) -> Gradients:
            return join_gradients(entries, pieces)

        try:
            return await by_rows(self._learning(send), every, tensors, ranges, join)
        except RemoteSchemaError:
            fresh = await self._described_now(described, budget)
            if fresh is None or len(ranges) > 1:  # some rows may have been trained on
                raise
            prepare(fresh, inputs, grad_outputs, present)
            if fresh[1] != described[1] or again:
                raise
            return await self.backward(inputs, grad_outputs, present, wants_grad, budget, None, None, fresh, again=True)

    # --- before anything is sent -----------------------------------------------------------------------------------------

    def _carrier(self, peer: PeerIDLike) -> CallBlocking | None:
        """What carries a call of the thread that asks; None if the event loop has to."""
        if self._blocking is None or self._described is None:
            return None
        return self._blocking.blocking(peer)

    def _looked_through(self, tensors: Sequence[torch.Tensor]) -> int:
        """How many bytes a check of these reads."""
        return sum(tensor.nbytes for tensor in tensors) if self.config.detect_anomalies else 0

    def _prepare_forward(
        self, described: Described, tensors: Sequence[torch.Tensor], present: tuple[str, ...]
    ) -> _Prepared:
        try:
            request, terms = self._request(described, present)
            entries = request.chain.entries
            rows = validate(entries, tensors)
            request.check_finite(tensors, entries)
            return _Prepared(request, terms, request.row_ranges(terms, entries, tensors, rows))
        except SchemaError as e:
            raise self._saying_whose(e) from None

    def _prepare_backward(
        self,
        described: Described,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        present: tuple[str, ...],
    ) -> _Prepared:
        try:
            request, terms = self._request(described, present)
            entries, grad_entries = request.chain.entries, request.chain.gradient_entries
            rows = validate(entries, inputs)
            validate(grad_entries, grad_outputs, rows=rows, what="grad_outputs")
            request.check_finite(grad_outputs, grad_entries)
            every, tensors = (*entries, *grad_entries), [*inputs, *grad_outputs]
            return _Prepared(request, terms, request.row_ranges(terms, every, tensors, rows))
        except SchemaError as e:
            raise self._saying_whose(e) from None

    def _request(self, described: Described, present: tuple[str, ...]) -> tuple[Request, Terms]:
        """What a call with these optional kwargs needs; put together once."""
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

    # --- what servers say only when they are called ----------------------------------------------------------------------

    def _learning(self, send: Callable[..., Awaitable[T]]) -> Callable[..., Any]:
        """``send`` that remembers how many rows a stock server takes."""

        async def learn(*args: Any) -> T:
            try:
                return await send(*args)
            except TooManyRows as e:
                described = self._described
                if described is not None and e.max_rows < described[0].max_batch_size:
                    smaller = msgspec.structs.replace(described[0], max_batch_size=e.max_rows)
                    self._described = smaller, described[1]
                raise

        return learn

    async def _described_now(self, known: Described, budget: Budget) -> Described | None:
        """What the expert says by now, if it is something else: a server has refused what fits what was told before."""
        if self._described is known:
            self.forget_description()
        try:
            fresh = await self.describe(budget)
        except MoEError:
            return None
        return None if fresh[0] == known[0] else fresh

    # --- attempts --------------------------------------------------------------------------------------------------------

    async def _attempts(
        self,
        attempt: Callable[[PeerIDLike, float | None], Awaitable[T]],
        timeout_s: float | None,
        budget: Budget,
        failed: Failed | None = None,
    ) -> T:
        """Try servers in turn until one answers, all have given final errors, or retries or time are used up.

        :param failed: the first attempt, if it was made before
        """
        failures: list[str] = []
        hopeless: set[str] = set()  # servers that would answer the same again
        for number in range(self.config.max_retries + 1):
            peer = failed.peer if failed is not None and number == 0 else self._next_peer(hopeless)
            try:
                if failed is not None and number == 0:
                    raise failed.error
                return await attempt(peer, budget.left_s(timeout_s))
            except MoEError as e:
                if isinstance(e, (SchemaError, ConfigError, LifecycleError, Unsupported, TooManyRows)):
                    raise  # ours, or nothing that has failed
                name = peer.to_base58()
                e.uid, e.peer = e.uid or self.uid, e.peer or name
                failures.append(f"{e.peer[-8:]}: {type(e).__name__}: {e.message}")
                if not e.retryable:
                    hopeless.add(name)
                over = all(other.to_base58() in hopeless for other in self.peers)
                if over or number == self.config.max_retries:
                    raise _with_history(e, failures) from e.__cause__
                delay_s = retry_delay_s(number, self.config, other_server=len(self.peers) > 1)
                left_s = _left_or_raise(budget, e, failures)
                if left_s is not None and left_s <= delay_s:
                    raise _with_history(e, failures) from None
                logger.debug("expert %s: attempt %d failed: %r", self.uid, number, e)
                first, *others = self.peers
                if others and first is peer:  # else another part of a split call, or another thread, has done so
                    self.peers = (*others, first)
                await asyncio.sleep(delay_s)
        raise AssertionError("unreachable")

    def _next_peer(self, hopeless: set[str]) -> PeerIDLike:
        peers = self.peers
        if not hopeless:
            return peers[0]
        return next((peer for peer in peers if peer.to_base58() not in hopeless), peers[0])


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


def _with_history(error: MoEError, failures: Sequence[str]) -> MoEError:
    if len(failures) < 2:
        return error
    return type(error)(f"{error.message} ({attempts_told(failures)})", peer=error.peer, uid=error.uid)


def attempts_told(failures: Sequence[str]) -> str:
    """The latest of them, in one line."""
    before = f"{len(failures) - MAX_TOLD} before; " if len(failures) > MAX_TOLD else ""
    return f"attempts: {before}{'; '.join(failures[-MAX_TOLD:])}"
