"""Blocks on servers in this process, a router without chance, and the same blocks here. Owns: what tests of sequences share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moe.client.routing import Span
from moe.client.sequential import RemoteSequential
from moe.config import ClientConfig
from moe.errors import MissingBlocks, MoEError
from moe.expert_uid import PeerIDLike
from moe.schema import BatchTensorProto, TensorProto
from moe.server.expert_backend import ExpertBackend
from moe.testing import FaultPlan, MemorySwarm, memory_swarm
from moe.transport.base import Budget
from moe.transport.memory import MemoryPeer
from tests.experts import HIDDEN, seeded

QUICK = ClientConfig(min_backoff_s=0.001, max_backoff_s=0.01, total_timeout_s=30.0, request_timeout_s=10.0)
PROMPT_LENGTH = 2


class Block(nn.Module):
    """x (B, T, D) -> (B, T, D): a linear map and a norm, with whatever a caller may add.

    mask (B, T) bool; prompt (B, P, D), added to the first P positions; lora_a (D, R), lora_b (R, D); scale (D).
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.launches = 0

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        prompt: torch.Tensor | None = None,
        lora_a: torch.Tensor | None = None,
        lora_b: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.launches += 1
        if prompt is not None:
            x = torch.cat([x[:, : prompt.shape[1]] + prompt, x[:, prompt.shape[1] :]], dim=1)
        y = self.linear(x)
        if lora_a is not None and lora_b is not None:
            y = y + x @ lora_a @ lora_b
        if scale is not None:
            y = y * scale
        if mask is not None:
            y = y * mask[..., None]
        normal: torch.Tensor = self.norm(x + torch.tanh(y))
        return normal


BLOCK_KWARGS = {
    "mask": BatchTensorProto(None, dtype=torch.bool),
    "prompt": BatchTensorProto(None, HIDDEN),
    "lora_a": TensorProto(HIDDEN, None),
    "lora_b": TensorProto(None, HIDDEN),
    "scale": TensorProto(HIDDEN),
}


def block_backend(uid: str, module: nn.Module, *, lr: float | None = None, **options: Any) -> ExpertBackend:
    """A backend of Block's schema."""
    return ExpertBackend(
        uid,
        module,
        None if lr is None else torch.optim.SGD(module.parameters(), lr=lr),
        args_schema=(BatchTensorProto(None, HIDDEN),),
        kwargs_schema=BLOCK_KWARGS,
        optional_kwargs=tuple(BLOCK_KWARGS),
        **options,
    )


class FixedRouter:
    """Takes, for each block, the first server that hosts it and has not failed, for as many blocks as it hosts.

    :param hosted: uids by peer (base58), the first ones first
    :param peers: their ids, unless they are names in a memory swarm
    :ivar failures: (peer, name of the error) as they were reported
    :ivar routes: what was chosen, as "start:end@peer"
    """

    def __init__(
        self,
        uids: Sequence[str],
        hosted: Mapping[str, Collection[str]],
        peers: Mapping[str, PeerIDLike] | None = None,
    ):
        self.peers = peers or {}
        self.uids, self.hosted = tuple(uids), {peer: set(own) for peer, own in hosted.items()}
        self.failures: list[tuple[str, str]] = []
        self.successes: list[str] = []
        self.routes: list[list[str]] = []
        self.refreshed = 0
        self.closed = False

    async def make_route(self, start: int, end: int, budget: Budget, *, avoid: Collection[str] = ()) -> list[Span]:
        missing = [uid for uid in self.uids[start:end] if not any(uid in own for own in self.hosted.values())]
        if missing:
            raise MissingBlocks(f"no live server for {len(missing)} of {end - start} blocks: {', '.join(missing)}")
        spans = []
        while start < end:
            holders = [peer for peer, own in self.hosted.items() if self.uids[start] in own]
            peer = next((peer for peer in holders if peer not in avoid), holders[0])
            stop = start + 1
            while stop < end and self.uids[stop] in self.hosted[peer]:
                stop += 1
            spans.append(Span(self.peers.get(peer) or MemoryPeer(peer), start, stop))
            start = stop
        self.routes.append([f"{span.start}:{span.end}@{span.peer_id.to_base58()}" for span in spans])
        return spans

    def on_request_failure(self, peer_id: PeerIDLike, error: MoEError) -> None:
        self.failures.append((peer_id.to_base58(), type(error).__name__))

    def on_request_success(self, peer_id: PeerIDLike) -> None:
        self.successes.append(peer_id.to_base58())

    def request_refresh(self) -> None:
        self.refreshed += 1

    def close(self) -> None:
        self.closed = True


class SequenceSwarm:
    """Servers of a sequence's blocks, and the blocks here.

    :ivar local: the blocks, as they were in the beginning
    """

    def __init__(self, swarm: MemorySwarm, router: FixedRouter, local: dict[str, nn.Module], config: ClientConfig):
        self.swarm, self.router, self.local, self.config = swarm, router, local, config

    @property
    def calls(self) -> list[tuple[str, str, str]]:
        """Forwards and backwards that have reached a server: (peer, method, uid)."""
        return [call for call in self.swarm.calls if call[1] != "info"]

    def sequence(self, uids: Sequence[str] | None = None, **config: Any) -> RemoteSequential:
        """The sequence of all blocks (or of others, known to the router too)."""
        settings = {**{name: getattr(self.config, name) for name in self.config.__dataclass_fields__}, **config}
        return RemoteSequential(
            self.swarm.transport,
            uids or self.router.uids,
            config=ClientConfig(**settings),
            manager=self.router,  # type: ignore[arg-type]
        )

    def run_locally(self, *args: torch.Tensor, per_block: Sequence[Mapping[str, Any]] = ()) -> Any:
        """What the blocks give here."""
        values: Any = args
        for i, uid in enumerate(self.router.uids):
            result = self.local[uid](*values, **(per_block[i] if per_block else {}))
            values = result if isinstance(result, tuple) else (result,)
        return values[0] if len(values) == 1 else values

    def kill(self, index: int) -> None:
        """A server is gone; the router does not know."""
        self.swarm.kill(index)


@contextlib.contextmanager
def sequence_swarm(
    *hosted: Sequence[int],
    make: Any = Block,
    backend: Any = block_backend,
    plan: FaultPlan | None = None,
    config: ClientConfig = QUICK,
    lr: float | None = None,
    **options: Any,
) -> Iterator[SequenceSwarm]:
    """Blocks b.0, b.1, ... on servers in this process.

    >>> with sequence_swarm([0, 1], [1, 2]) as swarm:
    ...     swarm.sequence()(torch.randn(2, 3, HIDDEN))

    :param hosted: for each server, the indices of its blocks; each has a copy of its own
    :param make: makes the module of a block
    :param backend: makes the backend of (uid, module, lr=...)
    :param plan: what goes wrong
    """
    count = 1 + max(max(own) for own in hosted)
    uids = [f"b.{i}" for i in range(count)]
    local = {uid: seeded(make, seed=i) for i, uid in enumerate(uids)}
    servers = [
        {uids[i]: backend(uids[i], copy.deepcopy(local[uids[i]]), lr=lr, **options) for i in own} for own in hosted
    ]
    router = FixedRouter(uids, {f"server{i}": set(own) for i, own in enumerate(servers)})
    with memory_swarm(*servers, plan=plan) as swarm:
        yield SequenceSwarm(swarm, router, local, config)
