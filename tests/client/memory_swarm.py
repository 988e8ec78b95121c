"""A swarm in this process for the tests of mixtures: real backends, handlers and Runtimes, a search that knows them all, and
faults on demand."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from moe.errors import NoExpertsFound
from moe.expert_uid import ExpertInfo, PeerIDLike, coordinates
from moe.schema import BatchTensorProto, TensorProto
from moe.server.connection_handler import ConnectionHandler
from moe.server.expert_backend import ExpertBackend
from moe.server.runtime import Runtime
from moe.testing import FaultPlan, FaultyTransport
from moe.transport.base import Call, CallBlocking, ExpertTransport, Reply
from moe.transport.event_loop import client_loop
from moe.transport.memory import MemoryPeer, MemoryTransport
from moe.wire.messages import ExpertDescription

DIM, RANK = 6, 3
PREFIX = "ffn."


class Adapted(nn.Module):
    """Takes (batch, any length, DIM) or (batch, DIM); optional mask per position and LoRA matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x, mask=None, lora_a=None, lora_b=None):
        y = self.first(x)
        if lora_a is not None:
            y = y + x @ lora_a @ lora_b
        y = self.second(torch.tanh(y))
        return y if mask is None else y * mask[..., None]


def adapted_schema(*middle: int | None) -> dict[str, Any]:
    """Schemas of Adapted for inputs (batch, *middle, DIM)."""
    return dict(
        args_schema=(BatchTensorProto(*middle, DIM),),
        kwargs_schema={
            "mask": BatchTensorProto(*middle, dtype=torch.bool),
            "lora_a": TensorProto(DIM, RANK),
            "lora_b": TensorProto(RANK, DIM),
        },
        optional_kwargs=("mask", "lora_a", "lora_b"),
    )


class Faults(MemoryTransport):
    """A memory transport that fails on demand.

    :ivar broken: (method, uid) -> what to raise
    :ivar stalled: (method, uid) of calls that never reach their server
    :ivar cancelled: (method, uid) of calls that were cancelled on their way
    """

    def __init__(self, services: dict[str, Any]) -> None:
        super().__init__(services)
        self.broken: dict[tuple[str, str], Exception] = {}
        self.stalled: set[tuple[str, str]] = set()
        self.cancelled: list[tuple[str, str]] = []

    async def _fault(self, key: tuple[str, str]) -> None:
        if key in self.broken:
            raise copy.copy(self.broken[key])
        if key in self.stalled:
            await asyncio.sleep(3600)

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        await self._fault(("info", uid))
        return await super().info(peer, uid, timeout_s=timeout_s)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        try:
            await self._fault((call.method, call.uid))
            return await super().call(peer, call, timeout_s=timeout_s)
        except asyncio.CancelledError:
            self.cancelled.append((call.method, call.uid))
            raise

    def count(self, method: str) -> int:
        """Calls of a method that reached a server."""
        return sum(called == method for _, called, _ in self.calls)


class FullSearch:
    """A beam search that looks at every expert. See BeamSearcher."""

    def __init__(self, grid_size: Sequence[int], uids: Sequence[str]) -> None:
        self.uid_prefix, self.grid_size = PREFIX, tuple(grid_size)
        self.uids = list(uids)
        self.searches: list[float | None] = []  # timeout_s of each
        self.forgotten: list[str] = []

    def search(self, batch_scores: Sequence[Any], beam_size: int, *, timeout_s: float | None) -> list[list[ExpertInfo]]:
        self.searches.append(timeout_s)
        if not self.uids:
            return [[] for _ in batch_scores[0]]
        where = np.array([coordinates(uid) for uid in self.uids])
        total = np.sum([np.asarray(scores)[:, where[:, dim]] for dim, scores in enumerate(batch_scores)], axis=0)
        ranked = np.argsort(-total, axis=1, kind="stable")[:, :beam_size]
        infos = [ExpertInfo(uid, MemoryPeer(uid)) for uid in self.uids]
        return [[infos[i] for i in row if scores[i] > -np.inf] for row, scores in zip(ranked, total)]

    def forget(self, uid: str) -> None:
        self.forgotten.append(uid)

    def no_experts_found(self) -> NoExpertsFound:
        return NoExpertsFound(f"no live experts under {self.uid_prefix}")


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its gradient, which it must have by now."""
    assert tensor.grad is not None
    return tensor.grad


class Swarm(AbstractContextManager["Swarm"]):
    """One server per expert of a grid.

    :param make: makes the module of each expert
    :param lr: of each expert's SGD; None: experts do not change
    :param isolated: a Runtime per expert, so that one can be stuck while others work
    :param options: of each ExpertBackend
    """

    def __init__(
        self,
        grid_size: Sequence[int] = (2, 4),
        make: Callable[[], nn.Module] = Adapted,
        *,
        lr: float | None = None,
        isolated: bool = False,
        **options: Any,
    ) -> None:
        uids = [PREFIX + ".".join(map(str, at)) for at in itertools.product(*map(range, grid_size))]
        options = options or adapted_schema()
        self.modules = {uid: make() for uid in uids}
        self.originals = copy.deepcopy(self.modules)
        self.backends = {
            uid: ExpertBackend(
                uid, module, None if lr is None else torch.optim.SGD(module.parameters(), lr=lr), **options
            )
            for uid, module in self.modules.items()
        }
        self.handlers = {uid: ConnectionHandler({uid: backend}) for uid, backend in self.backends.items()}
        self.transport = Faults(dict(self.handlers))
        self.search = FullSearch(grid_size, uids)
        groups = [{uid: b} for uid, b in self.backends.items()] if isolated else [self.backends]
        self._runtimes = [Runtime(group) for group in groups]

    def __enter__(self) -> Swarm:
        for runtime in self._runtimes:
            runtime.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for runtime in self._runtimes:
            runtime.shutdown()

    def kill(self, uid: str) -> None:
        """Its server cannot be reached any more."""
        del self.transport.services[uid]  # type: ignore[attr-defined]

    def mixture(self, cls: type, **options: Any) -> Any:
        """A mixture over this swarm, which gives failing experts no second chance unless told."""
        options.setdefault("in_features", DIM)
        return cls(
            dht=self.transport, uid_prefix=PREFIX, grid_size=self.search.grid_size, beam_search=self.search, **options
        )


class Blocking(FaultyTransport):
    """Carries calls of threads that wait, too, as the direct link does."""

    def __init__(self, inner: ExpertTransport) -> None:
        super().__init__(inner, FaultPlan())
        self.carried: list[Call] = []

    def blocking(self, peer: PeerIDLike) -> CallBlocking:
        def carry(call: Call, timeout_s: float | None) -> Reply:
            self.carried.append(call)
            return client_loop().run(self.inner.call(peer, call, timeout_s=timeout_s))

        return carry
