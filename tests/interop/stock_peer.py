"""A peer of stock hivemind, in a process of its own: a stock Server with experts, and a stock client that does as it is told.

``python -m tests.interop.stock_peer DESCRIPTOR_OF_A_CONNECTION``; see ``tests.interop.peers.StockPeer`` for the other
side. Uses nothing of ``moe``. Commands are the methods of ``Client``; their arguments and results are plain data and tensors.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from hivemind import DHT
from hivemind.compression import serialize_torch_tensor
from hivemind.moe import (
    ModuleBackend,
    RemoteExpert,
    RemoteMixtureOfExperts,
    RemoteSwitchMixtureOfExperts,
    Server,
    declare_experts,
    get_experts,
)
from hivemind.moe.client.beam_search import MoEBeamSearcher
from hivemind.moe.client.expert import create_remote_experts, expert_backward
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.moe.expert_uid import ExpertInfo
from hivemind.p2p import PeerID
from hivemind.utils import get_dht_time

from tests.interop.experts import KINDS, run
from tests.interop.peers import HOST_MADDRS, STOCK_GRID_UIDS, STOCK_UIDS, pack, unpack


class Client:
    """What a user of stock hivemind does.

    :param dht: the client's own DHT node
    :param server: the stock server next to it, to look into
    """

    def __init__(self, dht: DHT, server: Server):
        self.dht, self.server = dht, server
        self.experts: dict[str, RemoteExpert] = {}
        self.mixtures: dict[str, RemoteMixtureOfExperts] = {}

    # --- one expert ----------------------------------------------------------------------------------------------------

    def call(
        self,
        uid: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        grad_outputs: Sequence[torch.Tensor] | None = None,
        inputs_require_grad: bool = True,
    ) -> dict[str, Any]:
        """Outputs of an expert and, given gradients of them, those of its inputs."""
        result = run(self._expert(uid), args, kwargs, grad_outputs, inputs_require_grad=inputs_require_grad)
        return {"outputs": result.outputs, "input_grads": result.input_grads}

    def keyword_names(self, uid: str) -> list[str]:
        """Names of the keyword arguments that the expert says it takes."""
        return list(self._expert(uid).info["keyword_names"])

    def _expert(self, uid: str) -> RemoteExpert:
        if uid not in self.experts:
            (expert,) = get_experts(self.dht, [uid])
            if expert is None:
                raise LookupError(f"stock get_experts does not find {uid}")
            self.experts[uid] = expert
        return self.experts[uid]

    def call_at(self, uid: str, peer_id: str, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of an expert at a given peer, whether or not the DHT knows it."""
        (expert,) = create_remote_experts([ExpertInfo(uid, PeerID.from_base58(peer_id))], self.dht)
        return run(expert, (x,), {}).outputs

    def raw_backward(self, uid: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Send these tensors as they are, as a backward request."""
        messages = (serialize_torch_tensor(tensor) for tensor in tensors)
        sending = expert_backward(uid, tensors, messages, self._expert(uid).stub)
        grads: list[torch.Tensor] = RemoteExpertWorker.run_coroutine(sending)
        return grads

    # --- the DHT ---------------------------------------------------------------------------------------------------------

    def where(self, uids: list[str]) -> list[str | None]:
        """Where stock get_experts finds these experts."""
        return [None if e is None else e.peer_id.to_base58() for e in get_experts(self.dht, uids)]

    def declare(self, uids: list[str], seconds: float) -> bool:
        """Declare experts at this client's own peer, as a stock server does; True if every record was stored."""
        return all(declare_experts(self.dht, uids, get_dht_time() + seconds).values())

    def peer_ids(self) -> list[str]:
        """Of the client and of the server."""
        return [self.dht.peer_id.to_base58(), self.server.dht.peer_id.to_base58()]

    # --- mixtures --------------------------------------------------------------------------------------------------------

    def beam_search(
        self, prefix: str, scores: list[list[list[float]]], beam_size: int, options: dict[str, Any] | None = None
    ) -> list[list[str]]:
        """Uids of the best experts for each row of scores; ``scores[i][row]`` are those of grid dimension i."""
        searcher = MoEBeamSearcher(self.dht, prefix, [len(rows[0]) for rows in scores], **(options or {}))
        return [[e.uid for e in row] for row in searcher.batch_find_best_experts(scores, beam_size)]

    def mixture(
        self, prefix: str, grid_size: list[int], k_best: int, x: torch.Tensor, grad: torch.Tensor, switch: bool
    ) -> dict[str, Any]:
        """One forward and backward of a mixture over ``x``; its gate is made on first use and stays."""
        cls = RemoteSwitchMixtureOfExperts if switch else RemoteMixtureOfExperts
        key = f"{cls.__name__} {prefix}"
        if key not in self.mixtures:
            self.mixtures[key] = cls(
                in_features=x.shape[1],
                grid_size=tuple(grid_size),
                dht=self.dht,
                uid_prefix=prefix,
                k_best=k_best,
                **({"jitter_eps": 0.0} if switch else {}),
            )
        mixture = self.mixtures[key]
        mixture.zero_grad()
        x = x.clone().requires_grad_()
        output = mixture(x + 0.0)  # the switch jitters its input in place
        loss = torch.zeros(())
        if switch:
            output, loss = output
        torch.autograd.backward(output, grad)
        proj = mixture.proj
        return {
            "output": output.detach(),
            "balancing_loss": loss.detach(),
            "weight": proj.weight.detach(),
            "bias": proj.bias.detach(),
            "grad": x.grad,
            "weight_grad": proj.weight.grad,
        }

    def train_mixture(
        self, prefix: str, grid_size: list[int], k_best: int, x: torch.Tensor, target: torch.Tensor, steps: int
    ) -> list[float]:
        """Losses of training a new mixture, gate and experts, to map x to target."""
        mixture = RemoteMixtureOfExperts(
            in_features=x.shape[1], grid_size=tuple(grid_size), dht=self.dht, uid_prefix=prefix, k_best=k_best
        )
        optimizer = torch.optim.SGD(mixture.parameters(), lr=0.1)
        losses = []
        for _ in range(steps):
            loss = torch.nn.functional.mse_loss(mixture(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    # --- the server next door ----------------------------------------------------------------------------------------------

    def state(self, uid: str) -> dict[str, torch.Tensor]:
        """Parameters of an expert of the stock server."""
        return dict(self.server.module_backends[uid].module.state_dict())


def main() -> None:
    faulthandler.register(signal.SIGUSR1)  # here and in all that is forked: where each thread is, for the log
    tempfile.gettempdir()  # looked up under a lock: a child forked while a thread of the stock server holds it waits for ever
    connection = Connection(int(sys.argv[1]))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    initial_peers = unpack(connection.recv_bytes())
    # Both DHTs are forked before the server and the client start threads.
    client_dht = DHT(initial_peers, start=True, host_maddrs=HOST_MADDRS)
    server_dht = DHT(initial_peers, start=True, host_maddrs=HOST_MADDRS)
    options = {uid: KINDS[kind].backend_options() for kind, uid in STOCK_UIDS.items()}
    options.update((uid, KINDS["plain"].backend_options(trained=False)) for uid in STOCK_GRID_UIDS)
    backends = {uid: ModuleBackend(name=uid, **kwargs) for uid, kwargs in options.items()}
    server = Server(server_dht, backends, num_connection_handlers=1, start=True)
    while not all(get_experts(client_dht, list(backends))):
        time.sleep(0.1)
    client = Client(client_dht, server)
    connection.send_bytes(pack({"result": client.peer_ids()}))
    with contextlib.suppress(EOFError, OSError):
        while True:
            command, args, kwargs = unpack(connection.recv_bytes())
            began = time.monotonic()
            try:
                answer = {"result": getattr(client, command)(*args, **kwargs)}
            except Exception as e:
                traceback.print_exc()
                answer = {"error": type(e).__name__, "message": str(e), "seconds": time.monotonic() - began}
            connection.send_bytes(pack(answer))


if __name__ == "__main__":
    try:
        main()
    finally:
        os.killpg(0, signal.SIGKILL)  # this process leads a group of its own, with all that hivemind has started
