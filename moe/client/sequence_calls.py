"""One call of a sequence: through all its blocks, at whatever servers there are. Owns: sub-batches, retries over new routes,
and what a backward needs to know of its forward.

Must not know: autograd, devices other than CPU, how a route is chosen, how a span is called. Everything runs in the client's
event loop.

A sub-batch goes its own way: a route for all blocks, span after span. When a server fails, the rest from the failed block on
takes a new route, with the same kwargs. The backward goes back over the spans of the forward, at the same servers; where one
has failed, its blocks take a new route, and if that cuts them otherwise, the forward of the new pieces is computed again to
know what each was given. Nothing of a forward is ever changed, so it can be gone back over twice.

Idea: Petals' ``sequential_autograd.py`` (bigscience-workshop/petals), which had no kwargs in the part that recomputes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from moe.chains import Chain
from moe.client.calls import attempts_told, retry_delay_s
from moe.client.loop_lock import LoopLock
from moe.client.references import KeptRows
from moe.client.requests import (
    Described,
    Gradients,
    Request,
    even_ranges,
    in_parallel,
    join_gradients,
    join_outputs,
    ranges_of,
)
from moe.client.routing import Span
from moe.client.spans import BoundCall, SpanCaller, Unsuitable
from moe.config import ClientConfig
from moe.errors import (
    CallTimeout,
    ConfigError,
    ExpertNotFound,
    LifecycleError,
    MoEError,
    RemoteSchemaError,
    SchemaError,
)
from moe.expert_uid import PeerIDLike
from moe.schema import Entry, count_rows
from moe.transport.base import Budget
from moe.wire.messages import new_request_id

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Router(Protocol):
    """What is needed of a SequenceManager."""

    async def make_route(
        self, start: int, end: int, budget: Budget, *, avoid: Collection[str] = ()
    ) -> Sequence[Span]: ...

    def on_request_failure(self, peer_id: PeerIDLike, error: MoEError) -> None: ...

    def on_request_success(self, peer_id: PeerIDLike) -> None: ...

    def request_refresh(self) -> None: ...


class Leg(NamedTuple):
    """A span that was run, what its first block was given, flat, and whether the server keeps its inputs."""

    span: Span
    args: tuple[torch.Tensor, ...]
    kept: KeptRows


class Journey(NamedTuple):
    """How a forward went. Never changed afterwards.

    :ivar ranges: the rows of each sub-batch
    :ivar trails: the legs of each sub-batch
    """

    ranges: tuple[tuple[int, int], ...]
    trails: tuple[tuple[Leg, ...], ...]


class SequenceCaller:
    """Calls all blocks of a sequence, or of a slice of one.

    :param uids: the blocks
    :param router: which servers to use; of a sequence that has these blocks from ``offset`` on
    :param spans: how they are called
    """

    def __init__(
        self, uids: Sequence[str], router: Router, spans: SpanCaller, config: ClientConfig, *, offset: int = 0
    ):
        self.uids, self.router, self.spans, self.config, self.offset = tuple(uids), router, spans, config, offset
        self._describing = LoopLock()

    def __repr__(self) -> str:
        return f"SequenceCaller({len(self.uids)} blocks)"

    # --- what the blocks take ------------------------------------------------------------------------------------------

    @property
    def known(self) -> list[Described] | None:
        """What the blocks take, if all of them have been asked."""
        schemas = self.spans.known.schemas
        found = [schemas[uid] for uid in self.uids if uid in schemas]  # never taken out of it, by any thread
        return found if len(found) == len(self.uids) else None

    async def describe(self, budget: Budget) -> list[Described]:
        """What the blocks take; asked for once, of any server of each.

        :raises MissingBlocks: nobody hosts some of the blocks
        :raises MoEError: no server of a block has answered
        """
        async with self._describing.held(budget, "what blocks take"):
            attempts = self._attempts(budget)
            while (known := self.known) is None:
                schemas = self.spans.known.schemas
                unknown = [i for i, uid in enumerate(self.uids) if uid not in schemas]
                try:
                    route = await self._route(unknown[0], unknown[-1] + 1, attempts)
                except MoEError as e:
                    await attempts.failed(e, None)
                    continue
                answers = await asyncio.gather(*(self._learn(span, budget) for span in route), return_exceptions=True)
                for span, answer in zip(route, answers):
                    if isinstance(answer, BaseException):
                        await attempts.failed(answer, span)
            return known

    async def _learn(self, span: Span, budget: Budget) -> None:
        uids = self.uids[span.start : span.end]
        for uid, described in zip(uids, await self.spans.describe(span.peer_id, uids, budget)):
            if uid not in self.spans.known.schemas:
                self.spans.known.believe(uid, described, span.peer_id.to_base58())

    async def describe_otherwise(self, known: Sequence[Described], budget: Budget) -> list[Described] | None:
        """What other servers tell, where it is something else; None: they tell the same, or there are none.

        :param known: what was told
        """
        tellers = set(self.spans.known.tellers.values())
        others, differs = list(known), False
        try:
            route = await self._route(0, len(self.uids), self._attempts(budget), avoid=tellers)
            for span in route:
                if span.peer_id.to_base58() in tellers:
                    continue
                told = await self.spans.describe(span.peer_id, self.uids[span.start : span.end], budget)
                others[span.start : span.end] = told
                differs |= any(a[1] != b[1] for a, b in zip(told, known[span.start : span.end]))
        except MoEError as e:
            logger.debug("no other descriptions: %r", e)
        return others if differs else None

    def believe(self, described: Sequence[Described]) -> None:
        """Check calls against these from now on."""
        for uid, one in zip(self.uids, described):
            self.spans.known.believe(uid, one, "")

    # --- forward ---------------------------------------------------------------------------------------------------------

    async def forward(
        self, chain: Chain, tensors: Sequence[torch.Tensor], budget: Budget, *, keep: bool
    ) -> tuple[list[torch.Tensor], Journey]:
        """Flat outputs of the last block.

        :param tensors: args of the first block and kwargs, flat; they fit the chain
        :param keep: for a backward, what each span was given
        :raises MoEError: the last failure, with all attempts
        """
        self._check_finite(chain, tensors, chain.entries)
        ranges = self._ranges(chain, tensors)
        calls = [BoundCall(chain, part) for part in ranges_of(chain.entries, tensors, ranges)]

        async def run(call: BoundCall) -> tuple[list[torch.Tensor], tuple[Leg, ...]]:
            attempts = self._attempts(budget)
            legs, outputs = await self._walk(call, 0, len(chain), call.args, attempts, to_the_end=True, keep=keep)
            return outputs, tuple(legs)

        done = await in_parallel(run, calls)
        return join_outputs([outputs for outputs, _ in done]), Journey(tuple(ranges), tuple(legs for _, legs in done))

    def _ranges(self, chain: Chain, tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        """Rows of each sub-batch: at most ``max_tokens_per_request`` tokens, at least one row."""
        rows = count_rows(chain.entries, [tensor.shape for tensor in tensors])
        batched = [t for entry, t in zip(chain.entries, tensors[: chain.args]) if entry.proto.batched]
        length = batched[0].shape[1] if batched and batched[0].ndim >= 3 else 1
        if not chain.mergeable:
            return [(0, rows)]
        return even_ranges(rows, max(1, self.config.max_tokens_per_request // max(1, length)))

    async def _walk(
        self,
        call: BoundCall,
        start: int,
        end: int,
        args: Sequence[torch.Tensor],
        attempts: _Attempts,
        *,
        to_the_end: bool,
        keep: bool,
    ) -> tuple[list[Leg], list[torch.Tensor]]:
        """Run the blocks ``start:end``, over as many routes as it takes.

        :param args: of the first of them
        :param to_the_end: else the last leg is not run, only found
        :param keep: give the legs back
        :returns: the legs, and the outputs of the last one that was run
        """
        legs: list[Leg] = []
        values = list(args)
        while start < end:
            at: Span | None = None
            try:
                for at in await self._route(start, end, attempts):
                    attempts.check(at)
                    for piece in await self.spans.cut(call, at, attempts.budget):
                        at, leg = piece, Leg(piece, tuple(values), {})
                        if piece.end < end or to_the_end:
                            values = await self.spans.forward(
                                call, piece, values, attempts.budget, leg.kept if keep else None
                            )
                            self.router.on_request_success(piece.peer_id)
                        if keep:
                            legs.append(leg)
                        start = piece.end
            except MoEError as e:
                await attempts.failed(e, at)
        return legs, values

    async def _route(self, start: int, end: int, attempts: _Attempts, *, avoid: Collection[str] = ()) -> list[Span]:
        offset = self.offset

        async def make() -> list[Span]:
            avoided = attempts.avoid.union(avoid)
            found = await self.router.make_route(start + offset, end + offset, attempts.budget, avoid=avoided)
            return [Span(span.peer_id, span.start - offset, span.end - offset) for span in found]

        route = await make()
        return await make() if attempts.forgive(route) else route

    # --- backward --------------------------------------------------------------------------------------------------------

    async def backward(
        self,
        chain: Chain,
        tensors: Sequence[torch.Tensor],
        journey: Journey,
        grad_outputs: Sequence[torch.Tensor],
        wants: Sequence[bool],
        trainable: Sequence[bool],
        budget: Budget,
    ) -> Gradients:
        """One gradient or None per tensor; trains the blocks that have an optimizer, once.

        :param tensors: those of the forward
        :param journey: how the forward went
        :param grad_outputs: of the floating-point outputs, flat
        :param wants: one flag per tensor
        :param trainable: which blocks have an optimizer
        :raises MoEError: the last failure, with all attempts
        """
        self._check_finite(chain, grad_outputs, chain.gradient_entries)
        calls = [BoundCall(chain, part) for part in ranges_of(chain.entries, tensors, journey.ranges)]
        grads = ranges_of(chain.gradient_entries, grad_outputs, journey.ranges)
        first_needed = chain.first_needed(wants, trainable)

        async def run(work: tuple[BoundCall, tuple[Leg, ...], list[torch.Tensor]]) -> Gradients:
            return await self._back(*work, wants, first_needed, budget)

        pieces = await in_parallel(run, list(zip(calls, journey.trails, grads)))
        return join_gradients(chain.entries, pieces)

    async def _back(
        self,
        call: BoundCall,
        trail: Sequence[Leg],
        grads: list[torch.Tensor],
        wants: Sequence[bool],
        first_needed: int,
        budget: Budget,
    ) -> Gradients:
        """The backward of one sub-batch."""
        chain, request_id, attempts = call.chain, new_request_id(), self._attempts(budget)
        total: Gradients = [None] * len(chain.users)
        ahead = list(trail)
        while ahead and ahead[-1].span.end > first_needed:
            leg = ahead.pop()
            start, end = leg.span.start, leg.span.end
            try:
                answer = await self.spans.backward(
                    call, leg.span, leg.args, grads, wants, first_needed, request_id, budget, leg.kept
                )
            except MoEError as e:
                await attempts.failed(e, leg.span)
                legs, _ = await self._walk(call, start, end, leg.args, attempts, to_the_end=False, keep=True)
                ahead += legs
                continue
            self.router.on_request_success(leg.span.peer_id)
            for position, grad in answer.kwargs:
                earlier = total[position]
                total[position] = grad if earlier is None else earlier + grad
            if start == 0:
                total[: chain.args] = answer.args
            else:
                returned = chain.blocks[start - 1].schema.output_entries
                grads = [g.to(e.proto.dtype) for e, g in zip(returned, answer.args) if g is not None]
        return total

    # --- helpers ---------------------------------------------------------------------------------------------------------

    def _check_finite(self, chain: Chain, tensors: Sequence[torch.Tensor], entries: Sequence[Entry]) -> None:
        Request(self.spans.transport, chain, self.config).check_finite(tensors, entries)

    def _attempts(self, budget: Budget) -> _Attempts:
        return _Attempts(self.router, self.spans, self.config, budget)


class _Attempts:
    """Failures of one sub-batch in one direction: what they mean for the next attempt, and when it is enough.

    :ivar avoid: base58 peer ids that have failed
    """

    def __init__(self, router: Router, spans: SpanCaller, config: ClientConfig, budget: Budget):
        self.budget, self.avoid = budget, set[str]()
        self._router, self._spans, self._config = router, spans, config
        self._hopeless: dict[str, MoEError] = {}  # servers that will answer the same again
        self._latest: set[str] = set()  # to fail
        self._refused: set[str] = set()  # servers that have refused what fits what they had told
        self._causes: list[str] = []
        self._count = 0

    def forgive(self, route: Sequence[Span]) -> bool:
        """If all servers of some blocks have failed: avoid only the latest, so that the others get another chance.

        :returns: whether there is anything to choose anew
        """
        if not self.avoid.intersection(span.peer_id.to_base58() for span in route):
            return False
        before, self.avoid = self.avoid, {*self._hopeless, *self._latest}
        return self.avoid != before

    def check(self, span: Span) -> None:
        """Refuse a route that leads to a server which can only fail again: there is no other.

        :raises MoEError: how it failed
        """
        error = self._hopeless.get(span.peer_id.to_base58())
        if error is not None:
            raise _Final(self._with_history(error))

    async def failed(self, error: BaseException, span: Span | None) -> None:
        """Note a failure, and wait as long as is good before the next attempt.

        :param span: where; None: no route was found
        :raises MoEError: there is no next attempt
        """
        if isinstance(error, _Final):
            raise error.error
        if not isinstance(error, MoEError) or isinstance(error, (SchemaError, ConfigError, LifecycleError)):
            raise error  # a mistake of ours: nobody else would take it either
        if span is None and not self._causes:
            raise error
        if isinstance(error, Unsuitable):
            assert span is not None
            self._note(error, span)
            self._hopeless[span.peer_id.to_base58()] = SchemaError(error.message, peer=error.peer, uid=error.uid)
            return
        self._note(error, span)
        if span is not None:
            self._blame(error, span)
        self._count += 1
        try:
            left_s = self.budget.left_s()
        except CallTimeout:
            raise self._with_history(error) from None
        delay_s = retry_delay_s(self._count - 1, self._config, other_server=True)
        if self._count > self._config.max_retries or (left_s is not None and left_s <= delay_s):
            raise self._with_history(error) from None
        logger.debug("attempt %d of a sequence failed: %s", self._count, self._causes[-1])
        await asyncio.sleep(delay_s)

    def _note(self, error: MoEError, span: Span | None) -> None:
        where = "no route" if span is None else str(span)
        self._causes.append(f"{where}: {type(error).__name__.lstrip('_')}: {error.message}")
        if span is not None:
            self._latest = {span.peer_id.to_base58()}
            self.avoid |= self._latest

    def _blame(self, error: MoEError, span: Span) -> None:
        name = span.peer_id.to_base58()
        error.peer = error.peer or name
        self._router.on_request_failure(span.peer_id, error)
        self._spans.known.forget(name)
        if isinstance(error, ExpertNotFound):
            self._router.request_refresh()
        elif isinstance(error, RemoteSchemaError) and name not in self._refused:
            self._refused.add(name)  # it may take something else by now, which it is asked again
        elif not error.retryable:  # it would do the same again; another server may be sane
            self._hopeless[name] = error

    def _with_history(self, error: MoEError) -> MoEError:
        message = f"{error.message} ({attempts_told(self._causes)})"
        return type(error)(message, peer=error.peer, uid=error.uid)


class _Final(MoEError):
    """Carries the error that ends a call past those who would try again."""

    def __init__(self, error: MoEError):
        super().__init__(error.message, peer=error.peer, uid=error.uid)
        self.error = error
