"""One expert, asynchronously: what a forward or backward takes in requests. Owns: schema checks on the client, retries over an
expert's servers, deadlines.

Shared by RemoteExpert and the mixtures. Must not know: autograd, devices other than CPU, or how a server was
chosen. Everything runs in the client's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import torch

from moe.chains import Chain
from moe.client.references import Kept, KeptRows
from moe.client.requests import Gradients, Request, Terms, all_or_cancel, join_gradients, join_outputs, ranges_of
from moe.config import ClientConfig
from moe.errors import CallTimeout, ExpertNotFound, LifecycleError, MoEError, ProtocolError, SchemaError
from moe.expert_uid import PeerIDLike
from moe.schema import ExpertSchema, validate
from moe.transport.base import Budget, ExpertTransport
from moe.wire.messages import ExpertDescription, new_request_id

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
        self,
        tensors: Sequence[torch.Tensor],
        present: tuple[str, ...],
        budget: Budget,
        kept: KeptRows | None = None,
    ) -> list[torch.Tensor]:
        """Flat outputs for flat inputs that fit the schema; CPU tensors.

        :param kept: where to note which servers keep the inputs for the backward; None: they need not
        :raises SchemaError: inputs that do not fit (before anything is sent)
        :raises MoEError: no server could answer
        """
        request, terms = await self._request(present, budget)
        entries = request.chain.entries
        with self._saying_whose():
            rows = validate(entries, tensors)
            request.check_finite(tensors, entries)
            ranges = request.row_ranges(terms, entries, tensors, rows)

        def send(part: list[torch.Tensor], start: int, end: int) -> Coroutine[Any, Any, list[torch.Tensor]]:
            note = None if kept is None else kept.setdefault((start, end), Kept())
            return self._attempts(
                lambda peer, timeout_s: request.forward(peer, terms, part, end - start, timeout_s, note),
                self.config.request_timeout_s,
                budget,
            )

        parts = ranges_of(entries, tensors, ranges)
        return join_outputs(await all_or_cancel(send(part, *bounds) for part, bounds in zip(parts, ranges)))

    async def backward(
        self,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        present: tuple[str, ...],
        wants_grad: Sequence[bool],
        budget: Budget,
        kept: KeptRows | None = None,
    ) -> Gradients:
        """Gradients of flat inputs, given those of the floating-point outputs; trains the expert, once.

        :param wants_grad: one flag per input
        :param kept: what the forward of the same inputs has noted
        :returns: one gradient or None per input
        :raises SchemaError: tensors that do not fit (before anything is sent)
        :raises MoEError: no server could answer
        """
        request, terms = await self._request(present, budget)
        entries, grad_entries = request.chain.entries, request.chain.gradient_entries
        with self._saying_whose():
            rows = validate(entries, inputs)
            validate(grad_entries, grad_outputs, rows=rows, what="grad_outputs")
            request.check_finite(grad_outputs, grad_entries)
            every, tensors = (*entries, *grad_entries), [*inputs, *grad_outputs]
            ranges = request.row_ranges(terms, every, tensors, rows)
        wants, count = tuple(wants_grad), len(entries)

        def send(part: list[torch.Tensor], bounds: tuple[int, int]) -> Coroutine[Any, Any, Gradients]:
            request_id = new_request_id()  # one for all attempts
            note = None if kept is None else kept.get(bounds)
            return self._attempts(
                lambda peer, timeout_s: request.backward(
                    peer, terms, part[:count], part[count:], wants, [request_id], timeout_s, note
                ),
                self.config.request_timeout_s,
                budget,
            )

        parts = ranges_of(every, tensors, ranges)
        return join_gradients(entries, await all_or_cancel(map(send, parts, ranges)))

    async def _request(self, present: tuple[str, ...], budget: Budget) -> tuple[Request, Terms]:
        description, schema = await self.describe(budget)
        chain = Chain.single(self.uid, schema, present)
        return Request(self.transport, chain, self.config), Terms.of([description])

    @contextlib.contextmanager
    def _saying_whose(self) -> Iterator[None]:
        """Name the expert in errors about its schema."""
        try:
            yield
        except SchemaError as e:
            e.uid = e.uid or self.uid
            raise

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


def _left_or_raise(budget: Budget, error: MoEError, failures: list[str]) -> float | None:
    try:
        return budget.left_s()
    except CallTimeout:
        raise _with_history(error, failures) from None


def _with_history(error: MoEError, failures: list[str]) -> MoEError:
    if len(failures) < 2:
        return error
    return type(error)(f"{error.message} (attempts: {'; '.join(failures)})", peer=error.peer, uid=error.uid)
