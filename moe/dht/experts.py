"""Experts in the DHT. Owns: declaring, retracting and finding them, and listing servers.

The DHT cannot delete: a record is retracted by a *tombstone* (None) that ends a moment after it. Nodes of the DHT keep
what they once read until it expires; so that tombstones and new experts are seen at once, reads ask all who hold a key
and merge what they know. Functions that take a ``node`` run inside the DHT process, others call them there.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hivemind.dht import DHT, DHTNode
from hivemind.p2p import PeerID
from hivemind.utils import DHTExpiration, MPFuture, get_dht_time

from moe.dht.process import DEFAULT_TIMEOUT_S, call, call_in_background
from moe.dht.records import (
    DIRECTORY_KEY,
    MAX_PARTS,
    MAX_UID_CHARS,
    MAX_UIDS,
    TOMBSTONE_EDGE_S,
    FoundExpert,
    Hosted,
    PeerIDs,
    Place,
    Record,
    ServerInfo,
    ServerState,
    Successors,
    by_prefix,
    find_heirs,
    hosted_key,
    own_records,
    owner,
    part_key,
    read_hosted,
    read_part_count,
    read_parts,
    read_successors,
    replace_own,
    replace_stock,
    stock_records,
    uid_parts,
)
from moe.errors import ConfigError, TransportError
from moe.expert_uid import UID_PATTERN, ExpertPrefix, ExpertUID, is_valid_uid, split_uid

logger = logging.getLogger(__name__)

DEFAULT_EXPIRATION_S = 60.0  # twice the default announce period (ServerConfig.update_period_s)
TIMEOUT_PER_UID_S = 0.05  # on top; declaring 1024 experts took 4 s with 3 nodes, 15 s with 8, all on the same two cores
STALE_AFTER_S = 1.0  # how long a read waits for the last holders of a key before it takes what one of them knows
GIVE_UP_KEY_S = 5.0  # how long it then waits for a key; one with a malformed value is never answered by hivemind
MAX_NEIGHBOURS = 32  # addresses of peers by which a new node joins
_DYING_S = 0.5  # for a daemon that answers no more to be gone
MAX_OUTBID_S = 600.0  # how much longer than asked a record may live to replace one in its way; stock clients put "there
# is no such expert" in the place of a 1-D expert for up to 300 s
MAX_LISTED_PARTS = 4096  # list_servers reads no more parts of uids than this, whatever servers say
MAX_LISTED_UIDS = 2**20  # nor more uids
MAX_LISTED_CHARS = 2**26  # nor more of their characters


# --- reading and storing ---------------------------------------------------------------------------------------------


async def _read(
    node: DHTNode, keys: Iterable[str], *, latest: bool, num_workers: int | None = None
) -> dict[str, dict[Any, Record]]:
    """The unexpired records at each key by subkey (that of a plain value is None). What cannot be read is absent.

    :param latest: ask all holders of a key and merge what they know, subkey by subkey; else any one's copy will do
    """
    keys = list(dict.fromkeys(keys))
    if not keys:
        return {}
    searches: dict[str, asyncio.Future[Any]] = {}
    with contextlib.suppress(Exception):  # this node holds a malformed value for one of the keys
        ends_after = math.inf if latest else None
        searches = await node.get_many(keys, ends_after, num_workers=num_workers, return_futures=True)
        await asyncio.wait(searches.values(), timeout=STALE_AFTER_S if latest else GIVE_UP_KEY_S)
    late = [key for key in keys if key not in searches or not searches[key].done() or searches[key].exception()]
    found: dict[str, Any] = {key: searches[key].result() for key in keys if key not in late}
    for key in searches.keys() & set(late):
        searches[key].cancel()
    reads = (asyncio.wait_for(node.get(key), GIVE_UP_KEY_S) for key in late)
    found.update(zip(late, await asyncio.gather(*reads, return_exceptions=True)))
    now = get_dht_time()
    return {key: _records_of(found[key], now) for key in keys}


def _records_of(found: Any, now: float) -> dict[Any, Record]:
    if found is None or isinstance(found, BaseException):
        return {}
    entries = found.value if isinstance(found.value, dict) else {None: found}
    return {
        subkey: Record(entry.value, entry.expiration_time)
        for subkey, entry in entries.items()
        if hasattr(entry, "expiration_time") and entry.expiration_time > now
    }


async def _store(node: DHTNode, records: Mapping[Place, Record]) -> dict[Place, bool]:
    """Store each record; False if the last holder to answer refused it, as it has one that ends later."""
    if not records:
        return {}
    stored = await node.store_many(
        keys=[key for key, _ in records],
        values=[record.value for record in records.values()],
        expiration_time=[float(record.expiration_time) for record in records.values()],
        subkeys=[subkey for _, subkey in records],
    )
    return {(key, subkey): stored[key if subkey is None else (key, subkey)] for key, subkey in records}


# --- declaring -------------------------------------------------------------------------------------------------------


def declare_experts(
    dht: DHT,
    uids: Sequence[ExpertUID],
    expiration_time: DHTExpiration | None = None,
    wait: bool = True,
    *,
    info: ServerInfo | None = None,
    timeout_s: float | None = None,
) -> dict[Any, bool] | MPFuture[dict[Any, bool]]:
    """Make experts visible to all DHT peers; declare them again to prolong that.

    :param dht: a running DHT; the experts are declared to be at its peer
    :param uids: a list of expert uids
    :param expiration_time: DHT time until which they are visible; default: a minute from now
    :param wait: if False, do it in the background and return a future
    :param info: also tell the swarm this about the server. Unless it says that the server is online, nothing else is
        stored, and the experts do not become visible
    :param timeout_s: default 15 s and a little more for each expert
    :returns: for each stock key (``uid`` or ``(prefix, coordinate)``): True if the record stands, False if it was
        refused, normally because another server's record of the same expert or prefix ends later
    :raises ConfigError: if uids is a string or contains an invalid uid
    :raises CallTimeout: if this takes too long
    :raises TransportError: with ``info``: if nothing at all could be stored
    :raises LifecycleError: if the DHT is not running
    """
    uids = check_uids(uids)
    expiration_time = get_dht_time() + DEFAULT_EXPIRATION_S if expiration_time is None else float(expiration_time)
    args = uids, expiration_time, info.to_plain() if info is not None else None
    stage = f"declaring {len(uids)} experts"
    if not wait:
        return call_in_background(dht, stage, _declare, *args)
    return call(dht, stage, _declare, *args, timeout_s=_enough_for(uids) if timeout_s is None else timeout_s)


_declaring: dict[asyncio.Task[Any], set[ExpertUID]] = {}  # so that a retraction can end what would undo it


async def _declare(
    node: DHTNode, uids: list[ExpertUID], expiration_time: float, facts: dict[str, Any] | None
) -> dict[Any, bool]:
    task = asyncio.current_task()
    assert task is not None
    _declaring[task] = set(uids)
    try:
        me = node.peer_id.to_base58()
        online = facts is None or facts["state"] == ServerState.ONLINE
        stock = stock_records(uids, me) if online else {}
        wanted = {**(own_records(uids, me, facts) if facts is not None else {}), **stock}
        stored = await _store(node, {place: Record(value, expiration_time) for place, value in wanted.items()})

        refused = [place for place, ok in stored.items() if not ok]
        in_the_way = await _read(node, (key for key, _ in refused), latest=True)
        again: dict[Place, Record] = {}
        for place in refused:
            blocker = in_the_way[place[0]].get(place[1])
            if blocker is None or blocker.expiration_time > expiration_time + MAX_OUTBID_S:
                continue
            if place in stock and blocker.value is not None:
                stored[place] = owner(blocker.value) == me  # it stands, whichever of our experts it names
            else:
                outbid = max(expiration_time, blocker.expiration_time + TOMBSTONE_EDGE_S)
                again[place] = Record(wanted[place], outbid)
        stored.update(await _store(node, again))
        await _remember_neighbours(node)
        if facts is not None and not any(stored.values()):  # not even our own, where no other server is in the way
            raise TransportError("every record was refused")
        return {key if subkey is None else (key, subkey): stored[key, subkey] for key, subkey in stock}
    finally:
        del _declaring[task]


def _refuse_string(uids: Iterable[ExpertUID]) -> None:
    """One uid is not a list of uids, though it can be iterated over.

    :raises ConfigError: if it is a string
    """
    if isinstance(uids, str):
        raise ConfigError("Please send a list / tuple of expert uids.")


def check_uids(uids: Iterable[ExpertUID]) -> list[ExpertUID]:
    """The uids, each one once.

    :raises ConfigError: if they cannot be announced: a string instead of a list, invalid, too many
    """
    _refuse_string(uids)
    uids = list(dict.fromkeys(uids))
    for uid in uids:
        if not isinstance(uid, str) or not is_valid_uid(uid):
            raise ConfigError(f"{uid} is not a valid expert uid. All uids must follow {UID_PATTERN.pattern}")
    if len(uids) > MAX_UIDS or len(uid_parts(by_prefix(uids))) > MAX_PARTS:
        raise ConfigError(f"{len(uids)} uids are too many or too long for one server to announce")
    return uids


def _enough_for(uids: Sequence[ExpertUID]) -> float:
    return DEFAULT_TIMEOUT_S + TIMEOUT_PER_UID_S * len(uids)


# --- retracting ------------------------------------------------------------------------------------------------------


def retract_experts(dht: DHT, uids: Sequence[ExpertUID], timeout_s: float | None = None) -> None:
    """Make this peer's experts invisible again, at once for readers of this package; stock readers may go on seeing a
    copy they have read before, until it expires. Records of other servers stay, and where these host the same expert
    or another one below the same prefix, our record is handed over to them.

    :raises ConfigError: if uids is a string or contains an invalid uid
    :raises CallTimeout: if this takes too long; what was done by then stays done
    :raises LifecycleError: if the DHT is not running
    """
    uids = check_uids(uids)
    timeout_s = _enough_for(uids) if timeout_s is None else timeout_s
    call(dht, f"retracting {len(uids)} experts", _retract, uids, timeout_s=timeout_s)


async def _retract(node: DHTNode, uids: list[ExpertUID]) -> None:
    leaving = set(uids)
    declaring = [task for task, names in _declaring.items() if names & leaving]
    for task in declaring:
        task.cancel()
    await asyncio.gather(*declaring, return_exceptions=True)

    me = node.peer_id.to_base58()
    if not await _done_by(node, _replace_records(node, uids, me)):
        async with _stand_in(node) as other:
            await _replace_records(other, uids, me)


async def _replace_records(node: DHTNode, uids: list[ExpertUID], me: str) -> None:
    """Replace a peer's records of experts.

    :param node: of this peer, or of another one
    """
    places = [place for place in stock_records(uids, me) if place[1] is not None]
    keys = [*(key for key, _ in places), *map(hosted_key, by_prefix(uids)), DIRECTORY_KEY]
    found = await _read(node, keys, latest=True)
    directory = found[DIRECTORY_KEY].get(me)
    parts = read_part_count(directory.value) if directory is not None else 0
    found.update(await _read(node, (part_key(me, i) for i in range(parts)), latest=True))

    # prefixes and our own facts first: they are few, and all that readers of this package need
    planned, heirs = plan_retraction(uids, found, me)
    await _store(node, planned)

    # its node's own copy is enough: if another server's record has replaced ours, it ends later and so refuses this
    own_copies = await _read(node, uids, latest=node.peer_id.to_base58() != me)
    tombstones: dict[Place, Record] = {}
    for uid, records in own_copies.items():
        if None in records and records[None].value == me:
            tombstones[uid, None] = Record(heirs.get(uid), records[None].expiration_time + TOMBSTONE_EDGE_S)
    await _store(node, tombstones)


def plan_retraction(
    uids: Sequence[ExpertUID], found: Mapping[str, Mapping[Any, Record]], me: str
) -> tuple[dict[Place, Record], dict[ExpertUID, str]]:
    """What replaces a peer's records of experts, but for the stock records of the experts themselves. Pure.

    Anybody can store anything in our name. Records that make planning fail cost the expert in question its heirs, and no
    other expert anything: then all its records are replaced by tombstones.

    :returns: records, and for experts that others host, too, one of these
    """
    places = [place for place in stock_records(uids, me) if place[1] is not None]
    try:
        heirs = find_heirs(uids, found, me)
        return {**replace_stock(set(uids), places, found, heirs, me), **replace_own(set(uids), found, me)}, heirs
    except Exception as e:
        if len(uids) == 1:
            logger.warning("the records of %s make no sense, they are all replaced: %r", uids[0], e)
            mine = [*places, *((hosted_key(prefix), me) for prefix in by_prefix(uids)), (DIRECTORY_KEY, me)]
            there = ((place, found[place[0]].get(place[1])) for place in mine)
            return {
                place: Record(None, record.expiration_time + TOMBSTONE_EDGE_S)
                for place, record in there
                if record is not None and (place[1] == me or owner(record.value) == me)
            }, {}
    middle = len(uids) // 2
    first, heirs = plan_retraction(uids[:middle], found, me)
    after = {key: dict(records) for key, records in found.items()}
    for (key, subkey), record in first.items():
        after.setdefault(key, {})[subkey] = record
    second, others = plan_retraction(uids[middle:], after, me)
    return {**first, **second}, {**heirs, **others}


# --- when the libp2p daemon has died: what it would have stored, another one can store -------------------------------

_neighbours: list[str] = []  # addresses of peers, as of the last announcement


async def _remember_neighbours(node: DHTNode) -> None:
    with contextlib.suppress(Exception):  # the daemon is busy, or has died: those of last time, then
        peers = await asyncio.wait_for(node.p2p.list_peers(), GIVE_UP_KEY_S)
        _neighbours[:] = [f"{address}/p2p/{peer.peer_id.to_base58()}" for peer in peers for address in peer.addrs]


async def _done_by(node: DHTNode, work: Coroutine[Any, Any, None]) -> bool:
    """Run something that needs the libp2p daemon.

    :returns: False if the daemon has died before that was done
    """
    daemon = node.p2p._child
    working = asyncio.ensure_future(work)
    if daemon is None:  # another process looks after it
        await working
        return True
    ended = asyncio.ensure_future(daemon.wait())
    try:
        await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            # without a daemon, reads find nothing and stores store nowhere, which is no error
            await asyncio.wait_for(node.p2p.list_peers(), GIVE_UP_KEY_S)
            await working
            return True
    except Exception:
        if not ended.done():
            await asyncio.wait({ended}, timeout=_DYING_S)
        if not ended.done():
            raise
    finally:
        working.cancel()
        ended.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)
    return False


@contextlib.asynccontextmanager
async def _stand_in(node: DHTNode) -> AsyncIterator[DHTNode]:
    """A new node with a libp2p daemon of its own, in the same swarm.

    :raises Exception: if none of those that were known can be reached
    """
    if not _neighbours:
        raise TransportError("the libp2p daemon has died, and no other peer is known")
    logger.info("the libp2p daemon has died; another one tells the swarm")
    other = await DHTNode.create(
        initial_peers=_neighbours[:MAX_NEIGHBOURS],
        client_mode=True,
        num_workers=node.num_workers,
        record_validator=node.protocol.record_validator,
        ensure_bootstrap_success=False,
        strict=False,
    )
    try:
        yield other
    finally:
        await other.shutdown()


# --- finding ---------------------------------------------------------------------------------------------------------


def find_experts(
    dht: DHT,
    uids: Sequence[ExpertUID],
    expiration_time: DHTExpiration | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[FoundExpert | None]:
    """Who hosts these experts: the peer of the stock record first, then other servers by their own word, least loaded
    first. A stock record is not believed if its own peer says otherwise.

    :param expiration_time: count only servers announced at least until then; default: now
    :returns: for each uid, where it was found, or None
    :raises ConfigError: if uids is a string
    :raises CallTimeout: if this takes too long
    :raises LifecycleError: if the DHT is not running
    """
    _refuse_string(uids)
    if not uids:
        return []
    return call(dht, f"finding {len(uids)} experts", _find, list(uids), expiration_time, timeout_s=timeout_s)


async def _find(node: DHTNode, uids: list[ExpertUID], alive_at: float | None) -> list[FoundExpert | None]:
    now = get_dht_time()
    alive_at = now if alive_at is None else max(alive_at, now)
    stock, by_own_word = await _read_hosts(node, uids)

    def look(uid: ExpertUID) -> FoundExpert | None:
        prefix, coordinate = split_uid(uid)
        ends = dict(peer for peer in [stock.get(uid)] if peer is not None and peer[1] >= alive_at)
        for peer_id, server in by_own_word[prefix].items():
            if server.hosts(coordinate) and server.expiration_time >= alive_at:
                ends[peer_id] = max(server.expiration_time, ends.get(peer_id, 0.0))
        return FoundExpert(uid, tuple(ends), max(ends.values())) if ends else None

    return [look(uid) if is_valid_uid(uid) else None for uid in uids]


async def _read_hosts(
    node: DHTNode, uids: Iterable[ExpertUID]
) -> tuple[dict[ExpertUID, tuple[PeerID, float]], dict[ExpertPrefix, dict[PeerID, Hosted]]]:
    """What is known of who hosts these experts, as far as their uids are valid.

    :returns: by uid, the peer of the stock record and when that ends, unless the peer itself says otherwise; by prefix,
        the servers by their own word, least loaded first
    """
    peer_ids = PeerIDs()
    asked = {uid: split_uid(uid) for uid in uids if is_valid_uid(uid)}
    keys = {prefix: hosted_key(prefix) for prefix, _ in asked.values()}
    stock, own = await asyncio.gather(_read(node, asked, latest=False), _read(node, keys.values(), latest=True))
    by_own_word = {prefix: read_hosted(key, own[key], peer_ids) for prefix, key in keys.items()}

    def believed(uid: ExpertUID) -> tuple[PeerID, float] | None:
        record = stock[uid].get(None)
        peer_id = peer_ids.read(record.value) if record is not None else None
        if record is None or peer_id is None:
            return None
        prefix, coordinate = asked[uid]
        server = by_own_word[prefix].get(peer_id)
        return (peer_id, record.expiration_time) if server is None or server.hosts(coordinate) else None

    # what this node remembers of a retracted record may be older than another server's new one
    retracted = [uid for uid in asked if None in stock[uid] and believed(uid) is None]
    stock.update(await _read(node, retracted, latest=True))
    return {uid: peer for uid in asked if (peer := believed(uid)) is not None}, by_own_word


def find_servers(dht: DHT, uids: Sequence[ExpertUID], timeout_s: float = DEFAULT_TIMEOUT_S) -> list[ServerInfo]:
    """All live servers of any of these experts. One record is read for each uid and one for each prefix, however many
    servers there are.

    :returns: for each server its peer id, which of these experts it hosts, its load and speed as far as it told them (a
        stock server does not: zeros), and when the first of what it said ends; by peer id
    :raises ConfigError: if uids is a string
    :raises CallTimeout: if this takes too long
    :raises LifecycleError: if the DHT is not running
    """
    _refuse_string(uids)
    if not uids:
        return []
    return call(dht, f"finding servers of {len(uids)} experts", _find_servers, list(uids), timeout_s=timeout_s)


async def _find_servers(node: DHTNode, uids: list[ExpertUID]) -> list[ServerInfo]:
    now = get_dht_time()
    stock, by_own_word = await _read_hosts(node, uids)
    hosted: dict[str, list[ExpertUID]] = {}
    words: dict[str, list[Hosted]] = {}

    def add(peer_id: PeerID, names: list[ExpertUID], word: Hosted) -> None:
        if names and word.expiration_time > now:
            hosted.setdefault(peer_id.to_base58(), []).extend(names)
            words.setdefault(peer_id.to_base58(), []).append(word)

    for prefix, servers in by_own_word.items():
        coordinates = sorted({split_uid(uid)[1] for uid in uids if is_valid_uid(uid) and split_uid(uid)[0] == prefix})
        names = [f"{prefix}{coordinate}" for coordinate in coordinates]
        for peer_id, server in servers.items():  # not each server asked for each coordinate: there may be thousands
            ends = [(start, start + length) for start, length in zip(server.runs[::2], server.runs[1::2])]
            slices = ((bisect.bisect_left(coordinates, a), bisect.bisect_left(coordinates, b)) for a, b in ends)
            add(peer_id, [name for a, b in slices for name in names[a:b]], server)
    for uid, (peer_id, expiration_time) in stock.items():
        if uid not in hosted.get(peer_id.to_base58(), ()):
            add(peer_id, [uid], Hosted((), 0, expiration_time))
    return [
        ServerInfo(
            uids=tuple(hosted[peer]),
            throughput_rows_per_s=max(word.throughput_rows_per_s for word in words[peer]),
            pending_tasks=int(max(word.pending_tasks for word in words[peer])),
            peer_id=peer,
            expiration_time=min(word.expiration_time for word in words[peer]),
        )
        for peer in sorted(hosted)
    ]


def fetch_prefixes(
    dht: DHT,
    prefixes: Collection[ExpertPrefix],
    timeout_s: float = DEFAULT_TIMEOUT_S,
    *,
    num_workers: int | None = None,
) -> dict[ExpertPrefix, Successors]:
    """The live successors of each prefix: for each next coordinate an expert, and when its record ends. One request for
    all prefixes; ``{}`` for one that has no live successors.

    :param num_workers: concurrent workers of the search; default: the DHT's own
    :raises CallTimeout: if this takes too long
    :raises LifecycleError: if the DHT is not running
    """
    if not prefixes:
        return {}
    stage = f"looking up {len(prefixes)} prefixes"
    return call(dht, stage, _fetch, list(prefixes), num_workers, timeout_s=timeout_s)


async def _fetch(
    node: DHTNode, prefixes: list[ExpertPrefix], num_workers: int | None
) -> dict[ExpertPrefix, Successors]:
    peer_ids = PeerIDs()
    found = await _read(node, prefixes, latest=True, num_workers=num_workers)
    return {prefix: read_successors(prefix, found[prefix], peer_ids) for prefix in prefixes}


def list_servers(dht: DHT, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[ServerInfo]:
    """All servers that told the swarm about themselves, with their experts, by peer id. Stock servers do not.

    :raises CallTimeout: if this takes too long
    :raises LifecycleError: if the DHT is not running
    """
    return call(dht, "listing servers", _list, timeout_s=timeout_s)


async def _list(node: DHTNode) -> list[ServerInfo]:
    peer_ids = PeerIDs()
    servers: dict[str, ServerInfo] = {}
    parts: dict[str, list[str]] = {}
    room = MAX_LISTED_PARTS
    for peer, record in (await _read(node, [DIRECTORY_KEY], latest=True))[DIRECTORY_KEY].items():
        try:
            if peer_ids.read(peer) is None:
                raise ValueError("its subkey is not a peer id")
            info = ServerInfo.from_plain(record.value)
        except ValueError as e:
            logger.warning("skipping a malformed record of %.100r at %s: %s", peer, DIRECTORY_KEY, e)
            continue
        servers[peer] = replace(info, peer_id=peer, expiration_time=record.expiration_time)
        parts[peer] = [part_key(peer, i) for i in range(min(room, read_part_count(record.value)))]
        room -= len(parts[peer])

    found = await _read(node, (key for keys in parts.values() for key in keys), latest=True)
    room, room_chars = MAX_LISTED_UIDS, MAX_LISTED_CHARS
    for peer, keys in parts.items():
        try:
            written = (found[key][None].value for key in keys if None in found[key])
            uids = tuple(read_parts(written, min(MAX_UIDS, room), min(MAX_UID_CHARS, room_chars)))
            room -= len(uids)
            room_chars -= sum(map(len, uids))
            servers[peer] = replace(servers[peer], uids=uids)
        except ValueError as e:
            logger.warning("skipping a malformed list of the experts of %s: %s", peer, e)
    return [servers[peer] for peer in sorted(servers)]
