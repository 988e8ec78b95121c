"""Going where the swarm needs a server. Owns: what of the swarm matters for that, when to look, and the order of a move.

A move takes these steps, and may be given up after each of them:

1. Say which blocks will be left. A server that says so is no holder to others, so that of two holders of a block never
   both leave: whoever looks second sees that the first one is going.
2. Look again: has every block that will be left another holder, that answers?
3. Load the new blocks, announce them, wait until others see them.
4. Look again, as 2: loading may have taken minutes.
5. Make the old blocks invisible, serve them until nobody calls them any more, drop them.

Must not know: which place is better (block_selection), how experts come and go (hosting), how blocks are made (blocks).
"""

from __future__ import annotations

import logging
import random
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from moe.dht import DHT, ServerInfo, ServerState, find_servers, list_servers, ping_peers
from moe.errors import MoEError
from moe.expert_uid import ExpertPrefix, ExpertUID
from moe.server.block_selection import Span, choose_start, plan_move, sum_throughputs
from moe.server.blocks import BlockSource
from moe.server.expert_backend import ExpertBackend

logger = logging.getLogger(__name__)

_ASKED_PER_BLOCK = 4  # holders of a block that are asked whether they live; one that answers is enough
_STOP_TIMEOUT_S = 2.0  # for a look at the DHT to end; loading a block may take longer, its thread ends with the process


# --- what is known of the swarm ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwarmView:
    """The servers of a model without this one.

    :ivar spans: what they host or are about to host
    :ivar holders: for each block, the peers that serve it now and do not say that they leave it
    """

    spans: list[Span]
    holders: list[set[str]]

    @property
    def held(self) -> list[int]:
        """Blocks that have a holder."""
        return [block for block, peers in enumerate(self.holders) if peers]


def view_of(source: BlockSource, me: str, holders: Iterable[ServerInfo], servers: Iterable[ServerInfo]) -> SwarmView:
    """Put together what servers host and what they say about their plans. Pure.

    :param me: this server's peer id
    :param holders: of any of the model's blocks, as from ``find_servers``; stock servers too
    :param servers: as from ``list_servers``; those that are joining, and those that move
    """
    plans = {info.peer_id: info for info in servers if info.state != ServerState.OFFLINE}
    hosting = {info.peer_id: info for info in holders}
    joining = {peer: info for peer, info in plans.items() if info.state == ServerState.JOINING and peer not in hosting}
    spans: list[Span] = []
    held: list[set[str]] = [set() for _ in range(source.total)]
    for peer, info in {**hosting, **joining}.items():
        if peer is None or peer == me:
            continue
        plan = plans.get(peer)
        blocks = blocks_of(source, info.uids)
        if plan is not None:
            blocks -= set(read_blocks(source, plan.moving_from))
        if peer in hosting:
            for block in blocks:
                held[block].add(peer)
        if plan is not None:
            blocks |= set(read_blocks(source, plan.moving_to))
        runs = _runs(sorted(blocks))
        movable = (
            plan is not None and len(runs) == 1
        )  # a stock server stays; one in pieces has not been put there by us
        rows_per_s = max(info.throughput_rows_per_s, plan.throughput_rows_per_s if plan is not None else 0.0)
        spans += [Span(run.start, run.stop, rows_per_s, movable) for run in runs]
    return SwarmView(spans, held)


def blocks_of(source: BlockSource, uids: Iterable[ExpertUID]) -> set[int]:
    """Which blocks of the model these experts are; others are left out."""
    names = (uid.removeprefix(source.prefix) for uid in uids if uid.startswith(source.prefix))
    return {int(name) for name in names if re.fullmatch("[0-9]{1,9}", name) and int(name) < source.total}


def write_blocks(prefix: ExpertPrefix, blocks: range) -> str:
    """Consecutive blocks as a pattern, such as ``block.[0:4]``; nothing if there are none."""
    return f"{prefix}[{blocks.start}:{blocks.stop}]" if blocks else ""


def read_blocks(source: BlockSource, text: str) -> range:
    """Inverse of write_blocks, for text that came from a peer; none of another model, and no more than there are."""
    matched = re.fullmatch(re.escape(source.prefix) + r"\[([0-9]{1,9}):([0-9]{1,9})\]", text)
    return range(0) if matched is None else range(int(matched[1]), min(int(matched[2]), source.total))


def _runs(blocks: list[int]) -> list[range]:
    runs: list[range] = []
    for block in blocks:
        if runs and block == runs[-1].stop:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def look_at(dht: DHT, source: BlockSource) -> SwarmView:
    """Read the DHT.

    :raises MoEError: if it does not answer
    """
    uids = [source.uid(index) for index in range(source.total)]
    return view_of(source, dht.peer_id.to_base58(), find_servers(dht, uids), list_servers(dht))


def choose_blocks(view: SwarmView, total_blocks: int, num_blocks: int) -> range:
    """Where a server that joins is needed most."""
    start = choose_start(sum_throughputs(view.spans, total_blocks), num_blocks)
    return range(start, start + num_blocks)


# --- moving -----------------------------------------------------------------------------------------------------------


class Swarm(Protocol):
    """What a Rebalancer needs of the swarm. Everything may raise a MoEError."""

    def look(self) -> SwarmView:
        """What is known of the other servers."""
        ...

    def answering(self, peers: Collection[str]) -> set[str]:
        """Those of the peers that live."""
        ...

    def say(self, moving_from: str, moving_to: str) -> None:
        """Announce what this server is about to leave and to host. Returns when others can know."""
        ...


class Host(Protocol):
    """What a Rebalancer needs of its server: see there."""

    def add_backends(self, backends: Mapping[ExpertUID, ExpertBackend]) -> None:
        """Host more experts."""
        ...

    def remove_backends(self, uids: Collection[ExpertUID]) -> None:
        """Host these no longer."""
        ...


class DHTSwarm:
    """The swarm as the DHT knows it.

    :param say: announces what this server is about to leave and to host
    """

    def __init__(self, dht: DHT, source: BlockSource, say: Callable[[str, str], None]):
        self._dht, self._source = dht, source
        self.say = say

    def look(self) -> SwarmView:
        """See Swarm."""
        return look_at(self._dht, self._source)

    def answering(self, peers: Collection[str]) -> set[str]:
        """See Swarm."""
        return {peer for peer, elapsed_s in ping_peers(self._dht, sorted(peers)).items() if elapsed_s < float("inf")}


class Rebalancer:
    """Looks at the swarm now and then, and moves this server's blocks when that pays.

    :param source: makes blocks
    :param place: blocks hosted at the start; as many are hosted wherever the server goes
    :param host: the server
    :param swarm: the others
    :param rows_per_s: what this server can serve
    :param balance_quality: see ``plan_move``
    :param period_s: mean time between two looks; the time is random, so that servers do not all decide at once
    :param stopping: set when the server stops; then nothing is looked at any more
    :ivar place: blocks hosted now
    :ivar moves: finished so far
    """

    def __init__(
        self,
        source: BlockSource,
        place: range,
        host: Host,
        swarm: Swarm,
        *,
        rows_per_s: Callable[[], float],
        balance_quality: float,
        period_s: float,
        rng: random.Random | None = None,
        stopping: threading.Event | None = None,
    ):
        self.source, self.place, self.moves = source, place, 0
        self._host, self._swarm, self._rows_per_s = host, swarm, rows_per_s
        self._balance_quality, self._period_s, self._rng = balance_quality, period_s, rng or random.Random()
        self._stopping = stopping or threading.Event()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Rebalancer({write_blocks(self.source.prefix, self.place)!r}, {self.moves} moves)"

    def start(self) -> None:
        """Begin to look, in the background."""
        self._thread = threading.Thread(target=self._run, name="moe-rebalancer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more. A move under way ends with the server."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        torch.get_num_threads()  # so that torch.set_num_threads holds in this thread, too, when blocks are tried
        while not self._stopping.wait(self._rng.uniform(0.0, 2.0 * self._period_s)):
            try:
                self.look_and_move()
            except Exception as e:  # the swarm cannot be read, a block not be loaded: another time, perhaps
                if not self._stopping.is_set():
                    expected = isinstance(e, MoEError)
                    logger.warning("could not look for better blocks, or move there: %s", e, exc_info=not expected)

    def look_and_move(self) -> bool:
        """Move, if there is a better place.

        :returns: whether the server has moved
        :raises Exception: what keeps it from looking or moving; it hosts what it did before
        """
        view, old = self._swarm.look(), self.place
        own = Span(old.start, old.stop, self._rows_per_s())
        start = plan_move(own, view.spans, view.held, self.source.total, self._balance_quality, self._rng)
        if start is None:
            return False
        new = range(start, start + len(old))
        leaving, coming = _without(old, new), _without(new, old)
        logger.info("moving from blocks %d:%d to %d:%d", old.start, old.stop, new.start, new.stop)
        try:
            self._swarm.say(write_blocks(self.source.prefix, leaving), write_blocks(self.source.prefix, coming))
            moved = self._move(leaving, coming)
            if moved:
                self.place = new
                self.moves += 1
            return moved
        finally:
            try:
                self._swarm.say("", "")
            except MoEError as e:  # the next announcement says it
                if not self._stopping.is_set():
                    logger.warning("could not announce that the move is over: %s", e)

    def _move(self, leaving: range, coming: range) -> bool:
        if not self._may_leave(leaving):
            return False
        backends = self.source.make_all(coming)
        self._host.add_backends(backends)
        try:
            may_leave = self._may_leave(leaving)
        except MoEError as e:
            logger.warning("could not look at the swarm again: %s", e)
            may_leave = False
        self._host.remove_backends([self.source.uid(block) for block in (leaving if may_leave else coming)])
        return may_leave

    def _may_leave(self, blocks: range) -> bool:
        """True if each of these blocks has another holder that stays, and lives."""
        holders = self._swarm.look().holders
        asked = {block: self._some_of(holders[block]) for block in blocks}
        living = self._swarm.answering({peer for peers in asked.values() for peer in peers})
        alone = [block for block, peers in asked.items() if not living & set(peers)]
        if alone:
            logger.info("staying: block %d would have no other holder", alone[0])
        return not alone

    def _some_of(self, peers: set[str]) -> list[str]:
        return self._rng.sample(sorted(peers), min(len(peers), _ASKED_PER_BLOCK))


def _without(blocks: range, others: range) -> range:
    """Those of some consecutive blocks that are not among as many others."""
    if others.start <= blocks.start < others.stop:
        return range(others.stop, blocks.stop)
    if blocks.start <= others.start < blocks.stop:
        return range(blocks.start, others.start)
    return blocks
