"""Servers and clients in one process, without a network. Owns: putting the real parts together, holding the Runtime.

Everything but the network is real: backends, pools, Runtime, ConnectionHandler, RemoteExpert, the bytes between them.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from moe.client.expert import RemoteExpert
from moe.config import ClientConfig, HandlerConfig
from moe.errors import CallTimeout, NoExpertsFound
from moe.expert_uid import ExpertInfo
from moe.server.connection_handler import ConnectionHandler
from moe.server.expert_backend import ExpertBackend
from moe.server.runtime import Runtime
from moe.server.task_pool import Task, TaskPool, TaskResult
from moe.testing.faults import FaultPlan, FaultyTransport
from moe.testing.idle import check_idle
from moe.transport.base import ExpertService, ExpertTransport
from moe.transport.memory import MemoryPeer, MemoryTransport

HELD_AT_MOST_S = 60.0  # a Runtime that a test forgot to let go goes on after this; ours
_POLL_S = 0.001


class _Plug:
    """A pool whose one batch lasts as long as a test wants, so that other batches do not start."""

    def __init__(self) -> None:
        self.pool = TaskPool(self._hold, max_batch_size=1, name="pause")
        self._entered, self._released = threading.Event(), threading.Event()

    def get_pools(self) -> tuple[TaskPool, ...]:
        return (self.pool,)

    def to(self, device: torch.device | str) -> None:
        pass

    def _hold(self, tasks: list[Task]) -> list[TaskResult]:
        self._entered.set()
        self._released.wait(HELD_AT_MOST_S)
        return [[] for _ in tasks]

    @contextlib.contextmanager
    def in_place(self, timeout_s: float) -> Iterator[None]:
        self._entered.clear()
        self._released.clear()
        future = self.pool.submit(Task("pause", (), (), [], 0, group="pause", priority=-math.inf))
        if not self._entered.wait(timeout_s):
            future.cancel()
            raise CallTimeout(f"the Runtime took up nothing new within {timeout_s} s")
        try:
            yield
        finally:
            self._released.set()
            future.result(timeout_s)


class MemoryServer:
    """One server without network and processes. A context manager: serves inside, stops at the end.

    :param backends: experts by uid
    :param name: the peer name that clients see
    :param handler_config: what is accepted
    :param runtime_options: further parameters of Runtime (device, prefetch_batches, on_batch)
    """

    def __init__(
        self,
        backends: Mapping[str, ExpertBackend],
        name: str = "server",
        *,
        handler_config: HandlerConfig | None = None,
        **runtime_options: Any,
    ):
        self.backends, self.name = dict(backends), name
        self._plug = _Plug()
        self.handler = ConnectionHandler(self.backends, handler_config)
        self.runtime = Runtime({**self.backends, "pause": self._plug}, **runtime_options)

    def __repr__(self) -> str:
        return f"MemoryServer({self.name!r}, {list(self.backends)}, {self.runtime!r})"

    def __enter__(self) -> MemoryServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def peer(self) -> MemoryPeer:
        """This server's peer id."""
        return MemoryPeer(self.name)

    @property
    def pending(self) -> int:
        """Requests that wait in the pools."""
        return sum(pool.statistics().pending for pool in self.runtime.pools)

    def start(self) -> None:
        """Begin to compute. Requests are accepted before, and wait."""
        self.runtime.start()

    def stop(self) -> None:
        """Fail what waits, end the thread. May be called more than once."""
        self.runtime.shutdown()

    @contextlib.contextmanager
    def paused(self, timeout_s: float = 10.0) -> Iterator[None]:
        """Compute nothing inside the ``with``: what is requested meanwhile waits, and then forms batches."""
        with self._plug.in_place(timeout_s):
            yield

    def wait_pending(self, count: int, timeout_s: float = 10.0) -> None:
        """Wait until this many requests are in the pools.

        :raises CallTimeout: if they do not come
        """
        deadline = time.monotonic() + timeout_s
        while (pending := self.pending) < count:
            if time.monotonic() > deadline:
                raise CallTimeout(f"only {pending} of {count} requests came within {timeout_s} s")
            time.sleep(_POLL_S)


class MemorySwarm:
    """Memory servers and the transport that reaches them. Made by ``memory_swarm``.

    :ivar servers: in order; their peer names are "server0", "server1", ...
    :ivar transport: what clients call through; with a plan, one to which its faults happen
    """

    def __init__(self, servers: list[MemoryServer], plan: FaultPlan | None = None, config: ClientConfig | None = None):
        self.servers, self.config = servers, config
        self._services: dict[str, ExpertService] = {server.name: server.handler for server in servers}
        self._memory = MemoryTransport(self._services)
        self.transport: ExpertTransport = self._memory if plan is None else FaultyTransport(self._memory, plan)

    def __repr__(self) -> str:
        return f"MemorySwarm({self.servers})"

    @property
    def server(self) -> MemoryServer:
        """The first server."""
        return self.servers[0]

    @property
    def calls(self) -> list[tuple[str, str, str]]:
        """What reached the servers so far: (peer, method, uid)."""
        return self._memory.calls

    def expert(self, uid: str, *, config: ClientConfig | None = None) -> RemoteExpert:
        """A RemoteExpert on all running servers that host this uid, the first one first.

        :raises NoExpertsFound: if none does
        """
        peers = [s.peer for s in self.servers if uid in s.backends and s.name in self._services]
        if not peers:
            raise NoExpertsFound(f"no memory server hosts {uid!r}")
        info = ExpertInfo(uid, peers[0])
        return RemoteExpert(info, self.transport, replicas=peers[1:], config=config or self.config)

    def kill(self, index: int) -> None:
        """Stop a server: it cannot be reached any more, and calls that wait there fail."""
        self._services.pop(self.servers[index].name, None)
        self.servers[index].stop()


@contextlib.contextmanager
def memory_swarm(
    *backends: Mapping[str, ExpertBackend],
    plan: FaultPlan | None = None,
    config: ClientConfig | None = None,
    handler_config: HandlerConfig | None = None,
    **runtime_options: Any,
) -> Iterator[MemorySwarm]:
    """Serve experts in this process. When they have stopped, nothing may be left of any request: see ``check_idle``.

    >>> with memory_swarm({"ffn.0.0": ExpertBackend("ffn.0.0", module, args_schema=(BatchTensorProto(64),))}) as swarm:
    ...     y = swarm.expert("ffn.0.0")(torch.randn(3, 64))

    :param backends: experts by uid, one dict per server
    :param plan: what goes wrong, in the transport and in the Runtimes
    :param config: of the RemoteExperts
    :param handler_config: what the servers accept
    :param runtime_options: further parameters of Runtime (device, prefetch_batches, on_batch)
    """
    if plan is not None:
        runtime_options.setdefault("on_batch", plan.on_batch)
    servers = [
        MemoryServer(hosted, f"server{i}", handler_config=handler_config, **runtime_options)
        for i, hosted in enumerate(backends)
    ]
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        yield MemorySwarm(servers, plan, config)
    for server in servers:
        check_idle(server)
