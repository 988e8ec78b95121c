"""This project and stock hivemind side by side, with the same methods. Owns: every difference between using one and the other.

Used inside the processes of ``benchmarks.worker``, each of which imports one of them. Nothing is measured here.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from benchmarks.common import OURS, STOCK

HOST_MADDRS = ["/ip4/127.0.0.1/tcp/0"]
FIND_TIMEOUT_S = 60.0
Address = dict[str, Any]  # {"peer_id": ..., "maddrs": [...]}


class System(Protocol):
    """What benchmarks use of a system."""

    def serve(
        self,
        *,
        uids: Sequence[str],
        expert_cls: str,
        hidden_dim: int,
        optimizer: str,
        max_batch_size: int,
        num_handlers: int,
        device: str,
    ) -> Address:
        """Start a server in this process; it ends with the process.

        :param optimizer: "adam" or "none"
        :param num_handlers: processes that take requests; this project has none
        """
        ...

    def connect(self, address: Address, transport: str) -> None:
        """Make a libp2p daemon that reaches the server, as hivemind's benchmark does.

        :param transport: see ``moe.ClientConfig``; stock hivemind has only one
        """
        ...

    def expert(self, uid: str) -> Callable[..., Any]:
        """An expert of the server that this client is connected to."""
        ...

    def join(self, maddrs: Sequence[str]) -> Any:
        """A DHT node in a swarm; without addresses, of a new one."""
        ...

    def maddrs(self, node: Any) -> list[str]:
        """Where others reach a DHT node."""
        ...

    def mixture(self, node: Any, transport: str, *, prefix: str, grid: Sequence[int], k: int, width: int) -> Any:
        """A mixture of experts that can be found from this node."""
        ...

    def declare(self, node: Any, uids: Sequence[str], expiration_s: float) -> bool:
        """Declare experts at a node; True if every record was stored."""
        ...

    def find(self, node: Any, uids: Sequence[str]) -> int:
        """How many of these experts a node finds."""
        ...

    def searcher(self, node: Any, prefix: str, grid: Sequence[int]) -> Any:
        """A beam search that remembers nothing yet; has ``batch_find_best_experts``."""
        ...


def optimizer_class(name: str) -> Any:
    """What both systems call with an expert's parameters; None: it is not trained."""
    import torch

    return {"adam": torch.optim.Adam, "none": None}[name]


class CountingTransport:
    """Counts the bytes of tensors that are sent over a transport of this project."""

    def __init__(self, inner: Any):
        self._inner, self.sent_bytes = inner, 0

    async def info(self, *args: Any, **options: Any) -> Any:
        """See ExpertTransport."""
        return await self._inner.info(*args, **options)

    async def call(self, peer: Any, call: Any, **options: Any) -> Any:
        """See ExpertTransport."""
        self.sent_bytes += call.request_bytes
        return await self._inner.call(peer, call, **options)

    async def close(self) -> None:
        """The transport belongs to others."""


class Moe:
    """This project."""

    def __init__(self) -> None:
        for name in ("benchmarks.experts", "moe.client.moe", "moe.server.server"):  # now, not when it is timed
            importlib.import_module(name)
        self._server: Any = None
        self._experts: dict[str, Any] = {}

    def serve(self, *, num_handlers: int, optimizer: str, **options: Any) -> Address:
        """See System."""
        from moe import Server
        from moe.dht import visible_peer

        uids = options.pop("uids")
        self._server = Server.create(
            expert_uids=list(uids),
            optim_cls=optimizer_class(optimizer),
            host_maddrs=HOST_MADDRS,
            start=True,
            **options,
        )
        peer = visible_peer(self._server.dht)
        return {"peer_id": peer.peer_id.to_base58(), "maddrs": [str(maddr) for maddr in peer.addrs]}

    def connect(self, address: Address, transport: str) -> None:
        """See System."""
        from hivemind.p2p import P2P, PeerID

        from moe import ClientConfig
        from moe.client.expert import transport_of
        from moe.transport.event_loop import client_loop

        self._p2p = client_loop().run(P2P.create(initial_peers=address["maddrs"]))  # its daemon ends with it
        self._peer_id = PeerID.from_base58(address["peer_id"])
        self._config = ClientConfig(transport=transport)
        self._transport = transport_of(self._p2p, transport)

    def expert(self, uid: str) -> Callable[..., Any]:
        """See System."""
        from moe import RemoteExpert
        from moe.expert_uid import ExpertInfo

        if uid not in self._experts:
            self._experts[uid] = RemoteExpert(ExpertInfo(uid, self._peer_id), self._transport, config=self._config)
        expert: Callable[..., Any] = self._experts[uid]
        return expert

    def counted_expert(self, uid: str, *, hold_tensors: bool) -> tuple[Any, CountingTransport]:
        """A new client of an expert, and what counts the bytes that it sends.

        :param hold_tensors: see ``moe.ClientConfig``
        """
        from moe import ClientConfig, RemoteExpert
        from moe.expert_uid import ExpertInfo

        transport = CountingTransport(self._transport)
        config = ClientConfig(transport=self._config.transport, hold_tensors=hold_tensors)
        return RemoteExpert(ExpertInfo(uid, self._peer_id), transport, config=config), transport

    def join(self, maddrs: Sequence[str]) -> Any:
        """See System."""
        from moe.dht import start_dht

        return start_dht(maddrs, host_maddrs=HOST_MADDRS)

    def maddrs(self, node: Any) -> list[str]:
        """See System."""
        from moe.dht import visible_addresses

        return list(visible_addresses(node))

    def mixture(self, node: Any, transport: str, *, prefix: str, grid: Sequence[int], k: int, width: int) -> Any:
        """See System."""
        from moe import ClientConfig, RemoteMixtureOfExperts

        return RemoteMixtureOfExperts(
            in_features=width,
            grid_size=tuple(grid),
            dht=node,
            uid_prefix=prefix,
            k_best=k,
            config=ClientConfig(transport=transport, max_retries=1),
        )

    def declare(self, node: Any, uids: Sequence[str], expiration_s: float) -> bool:
        """See System."""
        from moe.dht import declare_experts, get_dht_time

        stored = declare_experts(node, uids, get_dht_time() + expiration_s)
        assert isinstance(stored, dict)
        return all(stored.values())

    def find(self, node: Any, uids: Sequence[str]) -> int:
        """See System."""
        from moe import get_experts

        return sum(found is not None for found in get_experts(node, list(uids)))

    def searcher(self, node: Any, prefix: str, grid: Sequence[int]) -> Any:
        """See System."""
        from moe import MoEBeamSearcher

        return MoEBeamSearcher(node, prefix, tuple(grid))


class Hivemind:
    """Stock hivemind 1.1.12."""

    def __init__(self) -> None:
        importlib.import_module("hivemind.moe")  # now, not when it is timed
        self._server: Any = None
        self._experts: dict[str, Any] = {}

    def serve(self, *, optimizer: str, **options: Any) -> Address:
        """See System."""
        from hivemind.moe import Server

        uids = options.pop("uids")
        self._server = Server.create(
            expert_uids=list(uids),
            optim_cls=optimizer_class(optimizer),
            host_maddrs=HOST_MADDRS,
            start=True,
            **options,
        )
        dht = self._server.dht
        return {"peer_id": dht.peer_id.to_base58(), "maddrs": self.maddrs(dht)}

    def connect(self, address: Address, transport: str) -> None:
        """See System."""
        from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
        from hivemind.p2p import P2P, PeerID

        self._p2p = RemoteExpertWorker.run_coroutine(P2P.create(initial_peers=address["maddrs"]))
        self._peer_id = PeerID.from_base58(address["peer_id"])

    def expert(self, uid: str) -> Callable[..., Any]:
        """See System."""
        from hivemind.moe import RemoteExpert
        from hivemind.moe.expert_uid import ExpertInfo

        if uid not in self._experts:
            self._experts[uid] = RemoteExpert(ExpertInfo(uid, self._peer_id), self._p2p)
        expert: Callable[..., Any] = self._experts[uid]
        return expert

    def join(self, maddrs: Sequence[str]) -> Any:
        """See System."""
        from hivemind import DHT

        return DHT(initial_peers=list(maddrs), start=True, host_maddrs=HOST_MADDRS)

    def maddrs(self, node: Any) -> list[str]:
        """See System."""
        return [str(maddr) for maddr in node.get_visible_maddrs()]

    def mixture(self, node: Any, transport: str, *, prefix: str, grid: Sequence[int], k: int, width: int) -> Any:
        """See System."""
        from hivemind.moe import RemoteMixtureOfExperts

        return RemoteMixtureOfExperts(in_features=width, grid_size=tuple(grid), dht=node, uid_prefix=prefix, k_best=k)

    def declare(self, node: Any, uids: Sequence[str], expiration_s: float) -> bool:
        """See System."""
        from hivemind.moe.server.dht_handler import declare_experts
        from hivemind.utils import get_dht_time

        return all(declare_experts(node, list(uids), get_dht_time() + expiration_s).values())

    def find(self, node: Any, uids: Sequence[str]) -> int:
        """See System."""
        from hivemind.moe import get_experts

        return sum(found is not None for found in get_experts(node, list(uids)))

    def searcher(self, node: Any, prefix: str, grid: Sequence[int]) -> Any:
        """See System."""
        from hivemind.moe.client.beam_search import MoEBeamSearcher

        return MoEBeamSearcher(node, prefix, tuple(grid))


SYSTEMS: dict[str, Callable[[], System]] = {OURS: Moe, STOCK: Hivemind}


def await_experts(system: System, node: Any, uids: Sequence[str]) -> None:
    """Wait until a node finds all these experts: servers announce them when they already serve."""
    deadline = time.monotonic() + FIND_TIMEOUT_S
    while system.find(node, uids) < len(uids):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the experts are not announced after {FIND_TIMEOUT_S} s")
        time.sleep(0.1)
