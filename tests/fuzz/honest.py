"""Honest clients: what they are told must be right, whatever others do to the server meanwhile.

Each thread calls experts over one transport and compares every answer with what it computes itself. Of the expert that is
trained, a thread owns one weight at a time, which then counts exactly the rows that it has sent.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from moe.client.expert import RemoteExpert
from moe.config import ClientConfig
from moe.dht import PeerID, start_dht, stop_dht
from moe.errors import MoEError
from moe.expert_uid import ExpertInfo
from tests.fuzz.experts import FFN_WIDTH, HOSTILE_SLOTS, NOP_WIDTH, SLOTS, SMALL_WIDTH, WIDE_VALUES, make_backends
from tests.swarm.tools import LOOPBACK, Child

ANSWER_WITHIN_S = 8.0  # for all attempts of a call together
_FORGOTTEN_AFTER_S = 20.0  # a request that got no answer can have no effect after this time
UIDS = ("nop.0", "wide.0", "mixer.0", "adapted.0", "slots.0", "ffn.0", "nap.0")


@dataclass
class Report:
    """What honest clients have met since they were last asked.

    :ivar wrong: answers that are not right, in words
    :ivar answered: calls, by transport
    :ivar failed: calls that got no answer, by transport and error
    :ivar longest_s: of an answered call
    """

    wrong: list[str] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0


class _Slot:
    """A weight of ``Slots`` that one thread trains, and what it may be now."""

    def __init__(self, number: int):
        self.number, self.least, self.most = number, 0.0, 0.0
        self.unsure_until = 0.0  # a request without an answer may still be trained


class _Client:
    """One thread's calls.

    :param local: the experts' modules, as they are here
    :param slots: numbers of the weights that are its own
    """

    def __init__(
        self, dht: Any, peer_id: Any, local: dict[str, Any], transport: str, slots: range, seed: int, report: Report
    ):
        config = ClientConfig(
            transport=transport, request_timeout_s=5.0, total_timeout_s=ANSWER_WITHIN_S, connect_timeout_s=5.0
        )
        self.transport, self._report, self._rng = transport, report, random.Random(seed)
        self._experts = {uid: RemoteExpert(ExpertInfo(uid, peer_id), dht, config=config) for uid in UIDS}
        self._local = local
        self._slots = [_Slot(number) for number in slots]
        self._kinds: list[Callable[[], str | None]] = [
            *[self._nop] * 2,
            self._wide,
            self._mixer,
            self._adapted,
            *[self._slot] * 3,
            self._ffn,
            self._nap,
        ]

    def call_once(self) -> None:
        """One random call; notes what came of it."""
        begin, kind = time.monotonic(), self._rng.choice(self._kinds)
        try:
            problem = kind()
        except MoEError as e:
            if e.retryable:  # the server had too much to do, or hung up on somebody
                self._report.failed[f"{self.transport} {type(e).__name__}"] += 1
                return
            problem = f"raised {e!r}"
        except Exception as e:
            problem = f"raised {e!r}"
        if problem:
            self._report.wrong.append(f"{self.transport} {kind.__name__}: {problem}"[:500])
        self._report.answered[self.transport] += 1
        self._report.longest_s = max(self._report.longest_s, time.monotonic() - begin)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self._rng.getrandbits(32)))

    def _nop(self) -> str | None:
        x = self._random(self._rng.choice((0, 1, 3, 64, 300, 1500)), NOP_WIDTH)
        return _difference("y", self._experts["nop.0"](x), x, exact=True)

    def _nap(self) -> str | None:
        x = self._random(2, SMALL_WIDTH).abs() * 0.02
        return _difference("y", self._experts["nap.0"](x), x, exact=True)

    def _wide(self) -> str | None:
        x = self._random(self._rng.randint(1, 4), SMALL_WIDTH)
        return _difference("y", self._experts["wide.0"](x), x[:, :1].expand(-1, WIDE_VALUES), exact=True)

    def _mixer(self) -> str | None:
        rows, length = self._rng.randint(1, 5), self._rng.choice((1, 7, 300))
        x, mask = self._random(rows, length, SMALL_WIDTH), self._random(rows, length) > 0
        kwargs: dict[str, Any] = {"index": torch.arange(rows), "mask": mask}
        if self._rng.random() < 0.5:
            kwargs["scale"] = self._random(SMALL_WIDTH)
        return self._compare("mixer.0", x, kwargs)

    def _adapted(self) -> str | None:
        x, rank = self._random(self._rng.choice((1, 8, 300)), FFN_WIDTH), self._rng.randint(1, 40)
        kwargs = {}
        if self._rng.random() < 0.8:
            kwargs = {"lora_a": self._random(FFN_WIDTH, rank), "lora_b": self._random(rank, 4 * FFN_WIDTH)}
        return self._compare("adapted.0", x, kwargs)

    def _compare(self, uid: str, x: torch.Tensor, kwargs: dict[str, torch.Tensor]) -> str | None:
        """Outputs and gradients of an expert that nobody trains, with those of the same module here."""
        results: list[list[tuple[str, torch.Tensor | None]]] = []
        for module in (self._experts[uid], self._local[uid]):
            own = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in {"x": x, **kwargs}.items()}
            y = module(own["x"], **{name: t for name, t in own.items() if name != "x"})
            outputs = list(y) if isinstance(y, tuple) else [y]
            (outputs[0] * torch.linspace(-1, 1, outputs[0].numel()).reshape(outputs[0].shape)).sum().backward()
            named = [(f"output {i}", output) for i, output in enumerate(outputs)]
            results.append(named + [(f"gradient of {name}", t.grad) for name, t in own.items()])
        problems = [_difference(name, got, wanted) for (name, got), (_, wanted) in zip(*results, strict=True)]
        return "; ".join(filter(None, problems)) or None

    def _ffn(self) -> str | None:
        """Others train it: all that is known is that it stays finite."""
        x = self._random(self._rng.choice((1, 16)), FFN_WIDTH).requires_grad_()
        y = self._experts["ffn.0"](x)
        (y * torch.linspace(-1, 1, FFN_WIDTH)).sum().backward()
        if not y.isfinite().all() or x.grad is None or not x.grad.isfinite().all():
            return "not finite any more"
        return None

    def _slot(self) -> str | None:
        """A forward and a backward: what is told of the weight is what it must be, and it is trained exactly once."""
        now = time.monotonic()
        slot = next((slot for slot in self._slots if slot.unsure_until <= now), None)
        if slot is None:
            return None
        rows = self._rng.choice((1, 2, 300))  # the last ones are kept for the backward
        x = torch.zeros(rows, SLOTS)
        x[:, slot.number] = 1.0
        x.requires_grad_()
        y = self._experts["slots.0"](x)
        seen = y.detach()[:, slot.number]
        if not bool((seen == seen[0]).all()) or not slot.least <= float(seen[0]) <= slot.most:
            return f"slot {slot.number} is {seen[:3].tolist()}, must be in [{slot.least}, {slot.most}]"
        slot.least = slot.most = value = float(seen[0])
        try:
            y.sum().backward()
        except MoEError:  # trained once, or not at all
            slot.least -= rows
            slot.unsure_until = time.monotonic() + _FORGOTTEN_AFTER_S
            raise
        slot.least = slot.most = value - rows
        assert x.grad is not None
        told = x.grad[:, slot.number]
        return None if bool((told == value).all()) else f"slot {slot.number}: gradient {told[:3].tolist()}, not {value}"


def _difference(name: str, got: torch.Tensor | None, wanted: torch.Tensor | None, exact: bool = False) -> str | None:
    if got is None or wanted is None:
        return None if got is wanted else f"{name} is there only once"
    if got.shape != wanted.shape:
        return f"{name} is {tuple(got.shape)}, not {tuple(wanted.shape)}"
    if exact and torch.equal(got, wanted):
        return None
    error = ((got - wanted).abs() / (1 + wanted.abs())).max().item() if wanted.numel() else 0.0
    return None if not exact and error < 1e-3 else f"{name} of {tuple(wanted.shape)} is off by {error}"


def call(pipe: Connection, peers: list[str], peer: str, transports: list[str], seed: int) -> None:
    """Clients of the given transports, a thread each; they call when told "go", and report when told "pause"."""
    torch.set_num_threads(1)
    dht = start_dht(peers, **LOOPBACK)
    calling, ending, report = threading.Event(), threading.Event(), Report()
    paused = [threading.Event() for _ in transports]
    share = (SLOTS - HOSTILE_SLOTS) // len(transports)

    def client_of(index: int, transport: str) -> _Client:
        first = HOSTILE_SLOTS + index * share
        local = {uid: backend.module for uid, backend in make_backends().items()}
        slots = range(first, first + share)
        return _Client(dht, PeerID.from_base58(peer), local, transport, slots, seed + index, report)

    def run(index: int, client: _Client) -> None:
        while not ending.is_set():
            paused[index].set()
            calling.wait()
            paused[index].clear()
            while calling.is_set():
                client.call_once()

    clients = [client_of(index, transport) for index, transport in enumerate(transports)]
    threads = [threading.Thread(target=run, args=one, daemon=True) for one in enumerate(clients)]
    for thread in threads:
        thread.start()
    try:
        pipe.send(dht.peer_id.to_base58())
        while True:
            if pipe.recv() == "go":
                calling.set()
                continue
            calling.clear()
            for event in paused:
                event.wait()
            told, report.__dict__ = Report(**report.__dict__), Report().__dict__
            pipe.send(told)
    except EOFError:
        pass
    finally:
        ending.set()
        calling.set()
        stop_dht(dht)


class HonestClients(Child):
    """``call`` in a process of its own. A context manager.

    :ivar peer: their peer id, base58
    """

    def __init__(self, peers: list[str], server: str, transports: list[str], seed: int):
        super().__init__(call, peers, server, transports, seed)
        try:
            self.peer: str = self.receive()
        except BaseException:
            self.__exit__()
            raise
        self.family()

    def go(self) -> None:
        """Let them call."""
        self.send("go")

    def pause(self) -> Report:
        """Let them finish what they have begun, and say how it went."""
        self.send("pause")
        report: Report = self.receive(3 * ANSWER_WITHIN_S)
        return report
