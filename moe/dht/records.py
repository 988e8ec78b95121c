"""Keys and values of the DHT. Owns: what is stored where, what a stored value must look like, what replaces it. No I/O.

Stock records, exactly hivemind's: ``uid -> peer id`` and, for each prefix, ``(prefix, coordinate) -> (uid, peer id)``.
Our own facts, under keys that stock readers never look at:

- ``_moe.experts.{prefix}``, one subkey per server: which coordinates under the prefix it hosts, its load and speed. One
  record for all experts of a prefix: a record per expert doubled the time to announce 1024 experts (4 s to 8 s).
- ``_moe.servers``, one subkey per server: its ServerInfo without uids, 171 bytes with two addresses, so that one
  message of the DHT (4 MiB) holds over 15,000 servers. The uids are at ``_moe.server.{peer id}.{part}``, in parts of
  bounded size.

Records are not signed: any peer of the swarm can forge them, as it can hivemind's. So what is read is checked strictly,
and nothing is expanded beyond a bound. Must not know: how records are stored and found, who reads them and why.
"""

from __future__ import annotations

import bisect
import enum
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from hivemind.p2p import PeerID

from moe.errors import ConfigError
from moe.expert_uid import (
    FLAT_EXPERT,
    UID_DELIMITER,
    Coordinate,
    ExpertInfo,
    ExpertPrefix,
    ExpertUID,
    is_valid_prefix,
    is_valid_uid,
    split_uid,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

DIRECTORY_KEY = "_moe.servers"
TOMBSTONE_EDGE_S = 1e-3  # by how much a record outlives the one it replaces before its time
MAX_UIDS = 2**16  # of one server
MAX_PART_BYTES = 32 * 1024  # of one part of a server's uids, by estimate
MAX_PARTS = 256  # of one server
MAX_UID_CHARS = 2**24  # of all uids of one server together
MAX_PEER_ID_CHARS = 128  # decoding base58 is quadratic; real ones have 46 to 52
_COORDINATES_PER_ENTRY = 1024  # of one prefix in one entry of a part
_COORDINATE_CHARS = 8  # allowed for one, whatever it is

Place = tuple[str, "Coordinate | str | None"]  # key and subkey; None: the key has a plain value
Text = Annotated[str, msgspec.Meta(max_length=128)]
MAX_AMOUNT = 1e18
Amount = Annotated[float, msgspec.Meta(ge=0, le=MAX_AMOUNT)]
Addresses = Annotated[tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(max_length=16)]


class Record(NamedTuple):
    """A value and the DHT time at which it ends."""

    value: Any
    expiration_time: float


Found = Mapping[str, Mapping[Any, Record]]  # what was read: by key, then by subkey


class ServerState(str, enum.Enum):
    """What a server says about itself. Its experts are visible only while it is online."""

    JOINING = "joining"
    ONLINE = "online"
    OFFLINE = "offline"


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a server tells the swarm besides where its experts are.

    :param state: only an online server's experts are announced
    :param uids: experts it hosts; set by list_servers, ignored by declare_experts
    :param version: of the software
    :param dtype: in which its experts compute
    :param device: on which they do
    :param throughput_rows_per_s: rows it can serve; 0: it does not say
    :param pending_tasks: waiting now; other things equal, the server with fewest is tried first
    :param addresses: for the direct link, as the transport writes them
    :param started_at: Unix time
    :param moving_from: blocks it is about to leave, as a pattern such as ``block.[0:4]``; it serves them until it has left
    :param moving_to: blocks it is about to serve instead
    :param peer_id: base58; set by list_servers
    :param expiration_time: DHT time at which this ends unless renewed; set by list_servers
    """

    state: ServerState = ServerState.ONLINE
    uids: tuple[ExpertUID, ...] = ()
    version: Text = ""
    dtype: Text = ""
    device: Text = ""
    throughput_rows_per_s: Amount = 0.0
    pending_tasks: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    addresses: Addresses = ()
    started_at: Amount = 0.0
    moving_from: Text = ""
    moving_to: Text = ""
    peer_id: str | None = None
    expiration_time: float | None = None

    def to_plain(self) -> dict[str, Any]:
        """Strings, numbers and lists that ``from_plain`` turns back into this, without uids, peer and expiration.

        :raises ConfigError: if a value is longer or larger than readers accept
        """
        plain = {name: value for name, value in msgspec.to_builtins(self).items() if name not in _NOT_STORED}
        plain |= {name: text for name in _RARE if (text := getattr(self, name))}
        plain["addresses"] = list(self.addresses)
        try:
            self.from_plain(plain)
        except ValueError as e:
            raise ConfigError(f"this server's info cannot be announced: {e}") from None
        return plain

    @classmethod
    def from_plain(cls, plain: Any) -> ServerInfo:
        """Inverse of to_plain, for data that came from a peer. Unknown names are ignored.

        :raises ValueError: if it is not that
        """
        if not isinstance(plain, dict):
            raise ValueError(f"expected a dict, got {type(plain).__name__}")
        return msgspec.convert({name: value for name, value in plain.items() if name not in _SET_BY_READERS}, cls)


_SET_BY_READERS = ("uids", "peer_id", "expiration_time")
_RARE = ("moving_from", "moving_to")  # absent unless there is something to say: of many servers, few are moving
_NOT_STORED = (*_SET_BY_READERS, *_RARE)


class FoundExpert(NamedTuple):
    """An expert and the servers that host it, in the order to try them."""

    uid: ExpertUID
    peer_ids: tuple[PeerID, ...]
    expiration_time: float  # when the last of these records ends


class Successor(NamedTuple):
    """One entry of a prefix: some live expert with this next coordinate."""

    expert: ExpertInfo
    expiration_time: float


Successors = dict[Coordinate, Successor]


# --- keys and values to store --------------------------------------------------------------------------------------


def leaf(uid: ExpertUID) -> tuple[ExpertPrefix, Coordinate]:
    """Where a prefix names this very expert. hivemind files an expert with a single coordinate below its own uid."""
    return split_uid(uid) if uid.count(UID_DELIMITER) > 1 else (uid + UID_DELIMITER, FLAT_EXPERT)


def hosted_key(prefix: ExpertPrefix) -> str:
    """Where servers tell which experts under a prefix they host."""
    return f"_moe.experts.{prefix}"


def part_key(peer: str, part: int) -> str:
    """Where a server keeps one part of its uids."""
    return f"_moe.server.{peer}.{part}"


def stock_records(uids: Iterable[ExpertUID], peer: str) -> dict[Place, Any]:
    """hivemind's records of these experts: each uid, and each prefix but the bare name with its next coordinate."""
    records: dict[Place, Any] = {}
    for uid in uids:
        records[uid, None] = peer
        prefix, coordinate = leaf(uid)
        records[prefix, coordinate] = (uid, peer)
        while prefix.count(UID_DELIMITER) > 2:
            prefix, coordinate = split_uid(prefix)
            records[prefix, coordinate] = (uid, peer)
    return records


def own_records(uids: Iterable[ExpertUID], peer: str, facts: Mapping[str, Any]) -> dict[Place, Any]:
    """Our own facts about a server and, if it is online, the experts it hosts."""
    grouped = by_prefix(uids)
    parts = uid_parts(grouped)
    records: dict[Place, Any] = {(DIRECTORY_KEY, peer): {**facts, "parts": len(parts)}}
    records.update({(part_key(peer, i), None): part for i, part in enumerate(parts)})
    if facts["state"] == ServerState.ONLINE:
        for prefix, coordinates in grouped.items():
            load = {name: facts[name] for name in ("pending_tasks", "throughput_rows_per_s")}
            records[hosted_key(prefix), peer] = {"runs": to_runs(coordinates), **load}
    return records


def by_prefix(uids: Iterable[ExpertUID]) -> dict[ExpertPrefix, list[Coordinate]]:
    """``["ffn.3.7", "ffn.3.8"]`` -> ``{"ffn.3.": [7, 8]}``, sorted."""
    grouped: dict[ExpertPrefix, list[Coordinate]] = {}
    for prefix, coordinate in sorted(map(split_uid, uids)):
        grouped.setdefault(prefix, []).append(coordinate)
    return grouped


def to_runs(coordinates: Iterable[Coordinate]) -> list[int]:
    """Coordinates as [start, length, start, length, ...]: neighbours, the usual case, cost next to nothing."""
    runs: list[int] = []
    for coordinate in sorted(coordinates):
        if runs and coordinate == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += [coordinate, 1]
    return runs


def uid_parts(grouped: Mapping[ExpertPrefix, Sequence[Coordinate]]) -> list[list[list[Any]]]:
    """A server's uids as several values of bounded size, so that no message of the DHT grows too large. Each is a list
    of [prefix, runs]: read back, a dict would look like a key with subkeys.
    """
    parts: list[list[list[Any]]] = []
    room = 0
    for prefix, coordinates in grouped.items():
        for start in range(0, len(coordinates), _COORDINATES_PER_ENTRY):
            runs = to_runs(coordinates[start : start + _COORDINATES_PER_ENTRY])
            size = len(prefix.encode()) + 9 * len(runs) + 8
            if size > room:
                parts.append([])
                room = MAX_PART_BYTES
            parts[-1].append([prefix, runs])
            room -= size
    return parts


# --- values that came from a peer ------------------------------------------------------------------------------------


def read_runs(runs: Any) -> list[int]:
    """Check what to_runs has made, without expanding it.

    :raises ValueError: if it is not that, or names more than MAX_UIDS coordinates
    """
    if not isinstance(runs, list) or len(runs) % 2 or not all(type(n) is int and 0 <= n < 2**62 for n in runs):
        raise ValueError("not a list of runs")
    ends = [start + length for start, length in zip(runs[::2], runs[1::2])]
    if any(end > start for end, start in zip(ends, runs[2::2])):
        raise ValueError("runs out of order")
    if sum(runs[1::2]) > MAX_UIDS:
        raise ValueError(f"more than {MAX_UIDS} coordinates")
    return runs


def expand(runs: Sequence[int]) -> list[Coordinate]:
    """Inverse of to_runs."""
    return [start + i for start, length in zip(runs[::2], runs[1::2]) for i in range(length)]


def read_parts(parts: Iterable[Any], max_uids: int = MAX_UIDS, max_chars: int = MAX_UID_CHARS) -> list[ExpertUID]:
    """Inverse of uid_parts. All of it is counted before any of it is expanded: a kilobyte can name 64 MiB of uids.

    :raises ValueError: if it is not that, or more than this
    """
    checked = [entry for part in parts for entry in _entries_of(part)]
    counts = [sum(runs[1::2]) for _, runs in checked]
    if sum(counts) > max_uids:
        raise ValueError(f"more than {max_uids} uids")
    if sum(count * (len(prefix) + _COORDINATE_CHARS) for count, (prefix, _) in zip(counts, checked)) > max_chars:
        raise ValueError(f"uids of more than {max_chars} characters")
    return [f"{prefix}{coordinate}" for prefix, runs in checked for coordinate in expand(runs)]


def _entries_of(part: Any) -> list[tuple[ExpertPrefix, list[int]]]:
    if not isinstance(part, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in part):
        raise ValueError("not a list of prefixes and runs")
    if not all(isinstance(prefix, str) and is_valid_prefix(prefix) for prefix, _ in part):
        raise ValueError("not a prefix")
    return [(prefix, read_runs(runs)) for prefix, runs in part]


def read_part_count(directory_entry: Any) -> int:
    """How many parts a server's uids have; 0 if it does not say."""
    parts = directory_entry.get("parts") if isinstance(directory_entry, dict) else 0
    return parts if type(parts) is int and 0 <= parts <= MAX_PARTS else 0


class PeerIDs:
    """Reads peer ids out of records, each one once."""

    def __init__(self) -> None:
        self._known: dict[str, PeerID] = {}

    def read(self, text: Any) -> PeerID | None:
        """A peer id, or None if this is not one."""
        if not isinstance(text, str) or not 0 < len(text) <= MAX_PEER_ID_CHARS:
            return None
        if text not in self._known:
            try:
                self._known[text] = PeerID.from_base58(text)
            except ValueError:
                return None
        return self._known[text]


def owner(value: Any) -> str | None:
    """Whose stock record this is: of ``peer`` or of ``(uid, peer)``."""
    if isinstance(value, tuple) and len(value) == 2:
        value = value[1]
    return value if isinstance(value, str) else None


def read_successors(prefix: ExpertPrefix, records: Mapping[Any, Record], peer_ids: PeerIDs) -> Successors:
    """The entries of a prefix that name an expert with that prefix; tombstones and anything odd are left out."""
    successors: Successors = {}
    for coordinate, (value, expiration_time) in records.items():
        if type(coordinate) is not int or not isinstance(value, tuple) or len(value) != 2:
            continue
        uid, peer_id = value[0], peer_ids.read(value[1])
        if peer_id is None or not isinstance(uid, str) or not is_valid_uid(uid):
            continue
        path = uid + UID_DELIMITER
        if path == prefix if coordinate == FLAT_EXPERT else path.startswith(f"{prefix}{coordinate}{UID_DELIMITER}"):
            successors[coordinate] = Successor(ExpertInfo(uid, peer_id), expiration_time)
    return successors


class Hosted(NamedTuple):
    """What one server says it hosts under a prefix. A tombstone hosts nothing."""

    runs: Sequence[int]
    pending_tasks: float
    expiration_time: float
    throughput_rows_per_s: float = 0.0  # not known

    def hosts(self, coordinate: Coordinate) -> bool:
        """Whether it hosts the expert with this coordinate."""
        starts = self.runs[::2]
        i = bisect.bisect_right(starts, coordinate) - 1
        return i >= 0 and coordinate < starts[i] + self.runs[2 * i + 1]


def read_hosted(key: str, records: Mapping[Any, Record], peer_ids: PeerIDs) -> dict[PeerID, Hosted]:
    """The servers of a prefix by their own word, least loaded first; malformed records are skipped with a warning."""
    servers: dict[PeerID, Hosted] = {}
    for subkey, (value, expiration_time) in records.items():
        peer_id = peer_ids.read(subkey)
        try:
            if peer_id is None:
                raise ValueError("its subkey is not a peer id")
            if value is None:
                servers[peer_id] = Hosted((), math.inf, expiration_time)
                continue
            if not isinstance(value, dict):
                raise ValueError(f"expected a dict, got {type(value).__name__}")
            servers[peer_id] = Hosted(
                read_runs(value.get("runs")),
                _read_amount(value, "pending_tasks"),
                expiration_time,
                _read_amount({"throughput_rows_per_s": 0.0, **value}, "throughput_rows_per_s"),
            )
        except ValueError as e:
            logger.warning("skipping a malformed record of %.100r at %.200s: %s", subkey, key, e)
    return dict(sorted(servers.items(), key=lambda item: (item[1].pending_tasks, item[0].to_base58())))


def _read_amount(value: Mapping[Any, Any], name: str) -> float:
    amount = value.get(name)
    if not isinstance(amount, (int, float)) or not 0 <= amount <= MAX_AMOUNT:
        raise ValueError(f"{name} is not a number from 0 to {MAX_AMOUNT:g}")
    return amount


# --- what replaces the records of experts that leave ----------------------------------------------------------------


def find_heirs(leaving: Iterable[ExpertUID], found: Found, me: str) -> dict[ExpertUID, str]:
    """For experts that other servers host too: the least loaded of these, to be named in the leaving one's records."""
    heirs: dict[ExpertUID, str] = {}
    peer_ids = PeerIDs()
    for prefix, coordinates in by_prefix(leaving).items():
        key = hosted_key(prefix)
        others = {peer: host for peer, host in read_hosted(key, found[key], peer_ids).items() if peer.to_base58() != me}
        for coordinate in coordinates:
            heir = next((peer for peer, server in others.items() if server.hosts(coordinate)), None)
            if heir is not None:
                heirs[f"{prefix}{coordinate}"] = heir.to_base58()
    return heirs


def replace_stock(
    leaving: set[ExpertUID], places: Iterable[Place], found: Found, heirs: Mapping[ExpertUID, str], me: str
) -> dict[Place, Record]:
    """What replaces our entries under prefixes: another live expert below the same prefix if there is one, else None.

    :param places: of the entries under prefixes, as in stock_records
    """
    planned: dict[str, dict[Any, Record]] = {}
    peer_ids = PeerIDs()
    for key, subkey in sorted(places, key=lambda place: -place[0].count(UID_DELIMITER)):  # leaves first
        record = found[key].get(subkey)
        uid = None if record is None or owner(record.value) != me else record.value[0]
        if record is None or not isinstance(uid, str) or uid not in leaving:  # anybody may have written it
            continue
        value = None
        if (key, subkey) == leaf(uid):
            value = (uid, heirs[uid]) if uid in heirs else None
        else:
            below = f"{key}{subkey}{UID_DELIMITER}"
            alive = read_successors(below, {**found.get(below, {}), **planned.get(below, {})}, peer_ids)
            if alive:
                expert = alive[min(alive)].expert
                value = (expert.uid, expert.peer_id.to_base58())
        planned.setdefault(key, {})[subkey] = Record(value, record.expiration_time + TOMBSTONE_EDGE_S)
    return {(key, subkey): record for key, records in planned.items() for subkey, record in records.items()}


def _or_nothing(read: Callable[[Any], list[T]], value: Any) -> list[T]:
    """What a record of our own says, and nothing if somebody else has put something into its place."""
    try:
        return read(value)
    except ValueError:
        return []


def replace_own(leaving: set[ExpertUID], found: Found, me: str) -> dict[Place, Record]:
    """What replaces our own facts: the same about the experts that stay; a server without any is offline."""
    planned: dict[Place, Record] = {}
    for prefix, coordinates in by_prefix(leaving).items():
        record = found[hosted_key(prefix)].get(me)
        if record is not None and isinstance(record.value, dict):
            staying = set(expand(_or_nothing(read_runs, record.value.get("runs")))) - set(coordinates)
            value = {**record.value, "runs": to_runs(staying)} if staying else None
            planned[hosted_key(prefix), me] = Record(value, record.expiration_time + TOMBSTONE_EDGE_S)
    directory = found[DIRECTORY_KEY].get(me)
    if directory is not None and isinstance(directory.value, dict):
        keys = [part_key(me, i) for i in range(read_part_count(directory.value))]
        written = [found[key][None].value for key in keys if None in found.get(key, {})]
        uids = [uid for part in written for uid in _or_nothing(read_parts, [part])]
        parts = uid_parts(by_prefix(uid for uid in uids if uid not in leaving))
        facts = {**directory.value, "parts": len(parts)}
        if not parts:
            facts["state"] = ServerState.OFFLINE.value
        ends = directory.expiration_time + TOMBSTONE_EDGE_S
        planned[DIRECTORY_KEY, me] = Record(facts, ends)
        planned.update({(part_key(me, i), None): Record(part, ends) for i, part in enumerate(parts)})
    return planned
