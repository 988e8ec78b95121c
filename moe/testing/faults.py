"""Failures as a script. Owns: which call or batch fails, and how. Sleeps for nothing and draws no random numbers.

A rule counts the calls that match it, in the order in which they start, and acts on the ones it was made for. Rules act
on any ``ExpertTransport``, in memory or real. Must not know: what a call means.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, cast

from moe.errors import ConnectError, MoEError, PeerGone
from moe.expert_uid import PeerIDLike
from moe.server.task_pool import Task, TaskPool
from moe.transport.base import Call, ExpertTransport, Reply, within
from moe.wire.messages import ExpertDescription

Proceed = Callable[[], Awaitable[Any]]
Action = Callable[[Proceed, str], Awaitable[Any]]  # (go on with the call, peer) -> what the caller gets


class InjectedFault(Exception):
    """Raised in a Runtime by a FaultPlan."""


class FiredFault(NamedTuple):
    """A fault that happened: what was done, and to which call (or batch: its pool's name is the method)."""

    action: str
    method: str
    uid: str = ""
    peer: str = ""


@dataclasses.dataclass
class _Rule:
    """Acts on the matching calls number ``at`` to ``at + times - 1``."""

    name: str
    action: Any
    method: str | None
    uid: str | None
    peer: str | None
    at: int
    times: int | None
    seen: int = 0

    def matches(self, method: str, uid: str, peer: str) -> bool:
        return self.method in (None, method) and self.uid in (None, uid) and self.peer in (None, peer)

    def counts_down(self) -> bool:
        self.seen += 1
        return self.seen >= self.at and (self.times is None or self.seen < self.at + self.times)

    def __repr__(self) -> str:
        return f"{self.name} at {self.method or 'any'} {self.at} (seen {self.seen})"


class FaultPlan:
    """A script of failures; pass it to FaultyTransport or ``memory_swarm(plan=...)``.

    >>> plan = FaultPlan()
    >>> plan.on("backward", at=2).drop_reply()
    >>> plan.on("forward", peer="server1", times=None).close()
    >>> plan.crash_runtime(at_batch=3)

    :ivar fired: what has happened so far, in order
    """

    def __init__(self) -> None:
        self.fired: list[FiredFault] = []
        self._calls: list[_Rule] = []
        self._batches: list[_Rule] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"FaultPlan({self._calls + self._batches}, {len(self.fired)} fired)"

    def on(
        self,
        method: str | None = None,
        *,
        at: int = 1,
        times: int | None = 1,
        uid: str | None = None,
        peer: str | None = None,
    ) -> FaultPoint:
        """Choose calls; the result says what happens to them.

        :param method: "info", "forward" or "backward"; None: any
        :param at: the first call to act on, counted from 1 among those that match
        :param times: how many in a row; None: all from then on
        :param uid: only calls of this expert
        :param peer: only calls to this peer (base58)
        """
        if at < 1 or (times is not None and times < 1):
            raise ValueError(f"calls are counted from 1: at={at}, times={times}")
        return FaultPoint(self, method, at, times, uid, peer)

    def crash_runtime(self, at_batch: int = 1, *, pool: str | None = None) -> None:
        """Let the Runtime die before its batch number ``at_batch``; needs ``Runtime(on_batch=plan.on_batch)``.

        :param pool: count only batches of the pool of this name, such as "ffn.0.0_backward"
        """
        self._batches.append(_Rule("crash_runtime", None, pool, None, None, at_batch, 1))

    @property
    def unfired(self) -> list[str]:
        """Rules that have not acted: a test that expects a failure should check that there are none."""
        with self._lock:
            return [repr(rule) for rule in self._calls + self._batches if rule.seen < rule.at]

    def on_batch(self, pool: TaskPool, batch: list[Task]) -> None:
        """The hook for ``Runtime(on_batch=...)``.

        :raises InjectedFault: where crash_runtime says so
        """
        for _ in self._take(self._batches, pool.name, "", ""):
            raise InjectedFault(f"the Runtime was told to crash at a batch of {pool.name}")

    def _add(self, rule: _Rule) -> None:
        with self._lock:
            self._calls.append(rule)

    def _take(self, rules: list[_Rule], method: str, uid: str, peer: str) -> list[_Rule]:
        """Count a call; the rules that act on it."""
        with self._lock:
            acting = [rule for rule in rules if rule.matches(method, uid, peer) and rule.counts_down()]
            self.fired += [FiredFault(rule.name, method, uid, peer) for rule in acting]
            return acting

    def _apply(self, proceed: Proceed, method: str, uid: str, peer: str) -> Awaitable[Any]:
        for rule in self._take(self._calls, method, uid, peer):
            proceed = _bind(rule.action, proceed, peer)
        return proceed()


def _bind(action: Action, proceed: Proceed, peer: str) -> Proceed:
    return lambda: action(proceed, peer)


@dataclasses.dataclass(frozen=True)
class FaultPoint:
    """Chosen calls, waiting to be told what happens to them. Made by FaultPlan.on."""

    plan: FaultPlan
    method: str | None
    at: int
    times: int | None
    uid: str | None
    peer: str | None

    def _act(self, name: str, action: Action) -> None:
        self.plan._add(_Rule(name, action, self.method, self.uid, self.peer, self.at, self.times))

    def refuse_connection(self) -> None:
        """The peer cannot be reached: ConnectError, at once."""

        async def action(proceed: Proceed, peer: str) -> Any:
            raise ConnectError("injected: the peer cannot be reached", peer=peer)

        self._act("refuse_connection", action)

    def close(self) -> None:
        """The connection breaks before the server has seen the request: PeerGone, at once."""

        async def action(proceed: Proceed, peer: str) -> Any:
            raise PeerGone("injected: closed before the request", peer=peer)

        self._act("close", action)

    def close_after_work(self) -> None:
        """The server does the work, then the connection breaks: PeerGone, and the reply is lost."""

        async def action(proceed: Proceed, peer: str) -> Any:
            with contextlib.suppress(MoEError):
                await proceed()
            raise PeerGone("injected: closed before the reply", peer=peer)

        self._act("close_after_work", action)

    def drop_reply(self) -> None:
        """The server does the work, but its reply never comes: the caller waits until its own deadline."""

        async def action(proceed: Proceed, peer: str) -> Any:
            with contextlib.suppress(MoEError):
                await proceed()
            await _silence()

        self._act("drop_reply", action)

    def stall(self, seconds: float | None = None) -> None:
        """The request is held back: for some seconds, or (None) for ever, so that the server never sees it."""

        async def action(proceed: Proceed, peer: str) -> Any:
            await (_silence() if seconds is None else asyncio.sleep(seconds))
            return await proceed()

        self._act("stall", action)

    def fail(self, error: BaseException) -> None:
        """The call raises this error; the server never sees it."""

        async def action(proceed: Proceed, peer: str) -> Any:
            raise error

        self._act("fail", action)

    def corrupt_reply(self, change: Callable[[Any], Any] | None = None) -> None:
        """The answer arrives changed.

        :param change: makes the wrong answer (a Reply, or for "info" an ExpertDescription) out of the right one;
            default: all tensors get a shape that no schema has asked for
        """

        async def action(proceed: Proceed, peer: str) -> Any:
            return (change or _with_wrong_shapes)(await proceed())

        self._act("corrupt_reply", action)

    def run(self, callback: Callable[[], object], *, after_work: bool = False) -> None:
        """Call something, such as ``lambda: swarm.kill(1)``, and go on with the call when that is done.

        :param after_work: only when the server has answered, but before the caller gets the answer
        """

        async def action(proceed: Proceed, peer: str) -> Any:
            loop = asyncio.get_running_loop()
            if not after_work:
                await loop.run_in_executor(None, callback)
                return await proceed()
            answer = await proceed()
            await loop.run_in_executor(None, callback)
            return answer

        self._act("run", action)


async def _silence() -> None:
    await asyncio.get_running_loop().create_future()


def _with_wrong_shapes(reply: Reply) -> Reply:
    return dataclasses.replace(reply, tensors=[t.new_zeros(1, 1, t.numel() + 1) for t in reply.tensors])


class FaultyTransport:
    """An ExpertTransport to which happens what a plan says.

    :param inner: carries the calls
    :param plan: the script
    """

    def __init__(self, inner: ExpertTransport, plan: FaultPlan):
        self.inner, self.plan = inner, plan

    def __repr__(self) -> str:
        return f"FaultyTransport({self.inner!r}, {self.plan!r})"

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        """See ExpertTransport."""
        name = peer.to_base58()
        answer = self.plan._apply(lambda: self.inner.info(peer, uid, timeout_s=timeout_s), "info", uid, name)
        return cast(ExpertDescription, await within(answer, timeout_s, f"info of {uid}", name))

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""
        name = peer.to_base58()
        answer = self.plan._apply(lambda: self.inner.call(peer, call, timeout_s=timeout_s), call.method, call.uid, name)
        return cast(Reply, await within(answer, timeout_s, f"{call.method} of {call.uid}", name))

    async def close(self) -> None:
        """See ExpertTransport."""
        await self.inner.close()
