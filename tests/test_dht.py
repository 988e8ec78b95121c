"""Records as pure data, then declaring, finding and retracting on real DHT nodes, their processes, and the Announcer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hivemind.moe.server.dht_handler as stock_server
import psutil
import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.moe.client.beam_search import MoEBeamSearcher as StockBeamSearcher
from hivemind.p2p import P2P
from hivemind.utils import MSGPackSerializer
from hivemind.utils.multiaddr import Multiaddr
from hypothesis import given
from hypothesis import strategies as st

import moe.dht.announcer
import moe.dht.experts
from moe.dht import (
    DHT,
    Announcer,
    PeerID,
    ServerInfo,
    ServerState,
    declare_experts,
    fetch_prefixes,
    find_experts,
    find_servers,
    get_dht_time,
    list_servers,
    peers_line,
    ping_peers,
    resolve_p2p,
    retract_experts,
    start_dht,
    stop_dht,
    visible_addresses,
    visible_peer,
)
from moe.dht import records as rec
from moe.dht.announcer import next_announcement
from moe.dht.experts import plan_retraction
from moe.dht.process import call
from moe.dht.records import DIRECTORY_KEY, PeerIDs, Record
from moe.errors import CallTimeout, ConfigError, LifecycleError, MoEError, TransportError
from moe.expert_uid import FLAT_EXPERT, ExpertInfo

ALICE, BOB, CAROL = PeerID(b"alice"), PeerID(b"bob"), PeerID(b"carol")
ME, OTHER, THIRD = ALICE.to_base58(), BOB.to_base58(), CAROL.to_base58()
MIXED_UIDS = ["ffn.3.7", "ffn.3.8", "ffn.4.0", "one.5", "deep.1.2.3", "deep.1.2.4", "deep.1.9.9.0"]


def eventually(condition: Callable[[], Any], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "this has not happened in time"
        time.sleep(0.05)


# --- records ---------------------------------------------------------------------------------------------------------


def test_stock_records_are_those_of_hivemind():
    stored: dict[Any, Any] = {}

    class Node:
        async def store_many(self, keys, values, expiration_time, subkeys, num_workers):
            stored.update(zip(zip(keys, subkeys), values))

    class Dht:
        peer_id, num_workers = ALICE, 4

    asyncio.run(stock_server._declare_experts(Dht(), Node(), MIXED_UIDS, 1.0))
    assert rec.stock_records(MIXED_UIDS, ME) == stored


def test_a_record_is_never_larger_than_a_message_allows():
    uids = [f"ffn.{i % 4}.{i // 4}" for i in range(1024)]
    own = rec.own_records(uids, ME, ServerInfo().to_plain())
    assert len(own) == 1 + 1 + 4  # directory, one part, one record for each prefix
    assert max(len(MSGPackSerializer.dumps(value)) for value in own.values()) < 200

    scattered = [f"{'n' * 200}{i}.{i * 3}" for i in range(5000)]
    many = [f"ffn.{i * 2}" for i in range(rec.MAX_UIDS)]
    for uids in (scattered, many):
        parts = rec.uid_parts(rec.by_prefix(uids))
        assert len(parts) <= rec.MAX_PARTS
        assert max(len(MSGPackSerializer.dumps(part)) for part in parts) < 2 * rec.MAX_PART_BYTES
        assert sorted(rec.read_parts(parts)) == sorted(uids)


@given(st.sets(st.integers(0, 60) | st.integers(0, 2**40), max_size=50))
def test_runs(coordinates):
    runs = rec.read_runs(rec.to_runs(coordinates))
    assert rec.expand(runs) == sorted(coordinates)
    server = rec.Hosted(runs, 0, 0.0)
    for coordinate in {*coordinates, *(c + 1 for c in coordinates), *(max(0, c - 1) for c in coordinates), 0}:
        assert server.hosts(coordinate) == (coordinate in coordinates)


@pytest.mark.parametrize(
    "runs",
    [None, (), "01", b"01", {}, [1], [1.0, 1], [True, 1], [-1, 1], [0, -1], ["0", 1], [0, rec.MAX_UIDS + 1], [0, 2**61],
     [5, 1, 0, 1], [0, 5, 3, 1], [2**63, 1]],
)  # fmt: skip
def test_hostile_runs_are_refused_unexpanded(runs):
    with pytest.raises(ValueError):
        rec.read_runs(runs)
    with pytest.raises(ValueError):
        rec.read_parts([[["ffn.", runs]]])


@pytest.mark.parametrize(
    "part", [None, {}, "ffn.", [1], [["ffn."]], [["ffn", [0, 1]]], [[7, [0, 1]]], [["a.", [0, 2**16]], ["b.", [0, 1]]]]
)
def test_hostile_parts_are_refused(part):
    with pytest.raises(ValueError):
        rec.read_parts([part])


def test_uids_are_counted_before_they_are_expanded():
    """Of one server's parts together, and by their characters: a prefix may be a thousand of them."""
    with pytest.raises(ValueError, match="more than 65536 uids"):
        rec.read_parts([[["a.", [0, 2**15]]], [["b.", [0, 2**15]]], [["c.", [0, 1]]]])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="characters"):
            rec.read_parts([[["a" * 1000 + ".", [0, 2**16]]]])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_server_info_round_trip():
    info = ServerInfo(
        state=ServerState.JOINING,
        version="1.0",
        dtype="bfloat16",
        device="cuda:0",
        throughput_rows_per_s=12.5,
        pending_tasks=3,
        addresses=("tls://10.0.0.1:1234", "unix:///tmp/x"),
        started_at=1e9,
        moving_from="block.[0:4]",
        moving_to="block.[4:8]",
    )
    plain = MSGPackSerializer.loads(MSGPackSerializer.dumps(info.to_plain()))
    assert ServerInfo.from_plain({**plain, "from_the_future": [1, 2]}) == info
    assert ServerInfo.from_plain({**plain, "uids": ["x.1"], "peer_id": "me", "expiration_time": 5.0}) == info


def test_servers_that_do_not_move_say_nothing_about_it():
    assert not [name for name in ServerInfo().to_plain() if name.startswith("moving")]


@pytest.mark.parametrize(
    "plain",
    [None, [], "online", {"state": "asleep"}, {"state": 1}, {"version": "x" * 129}, {"version": b"1"}, {"pending_tasks": -1},
     {"pending_tasks": "many"}, {"pending_tasks": 2**60}, {"throughput_rows_per_s": math.nan},
     {"throughput_rows_per_s": math.inf}, {"throughput_rows_per_s": True}, {"addresses": "tcp://x"},
     {"addresses": ["x" * 257]}, {"addresses": ["x"] * 17}, {"addresses": [1]}, {"started_at": None}, {1: 2}],
)  # fmt: skip
def test_hostile_server_infos_are_refused(plain):
    with pytest.raises(ValueError):
        ServerInfo.from_plain(plain)


def test_what_readers_would_refuse_is_not_announced():
    with pytest.raises(ConfigError, match="version"):
        ServerInfo(version="x" * 200).to_plain()


def test_only_successors_that_fit_the_prefix_are_read():
    def read(prefix: str, records: dict[Any, Any]) -> dict[int, str]:
        found = rec.read_successors(prefix, {key: Record(value, 5.0) for key, value in records.items()}, PeerIDs())
        assert all(successor.expiration_time == 5.0 for successor in found.values())
        return {coordinate: successor.expert.uid for coordinate, successor in found.items()}

    good: dict[Any, Any] = {7: ("ffn.3.7", ME), 8: ("ffn.3.8.1", OTHER)}
    hostile: dict[Any, Any] = {
        0: None, 1: "ffn.3.1", 2: ["ffn.3.2", ME], 3: ("ffn.3.3",), 4: ("ffn.3.4", 5), 5: ("ffn.3.5", ""), 6: (6, ME),
        "9": ("ffn.3.9", ME), 10: ("ffn.4.10", ME), 11: ("ffn.3.011", ME), 12: ("ffn.3.1", ME),
        13: ("ffn.3.13", "0OIl"), 14: ("ffn.3.14", "1" * 1000), -1: ("ffn.3.5", ME), -2: ("ffn.3.-2", ME), None: "x",
        15: ("x" * 2000 + ".3.15", ME), 16: ("ffn.3.16", ME.encode()),
    }  # fmt: skip
    assert read("ffn.3.", {**hostile, **good}) == {7: "ffn.3.7", 8: "ffn.3.8.1"}
    assert read("ffn.3.", {True: ("ffn.3.1", ME)}) == {}
    assert read("one.5.", {-1: ("one.5", ME), 0: ("one.5", ME)}) == {-1: "one.5"}
    assert read("one.5.", {-1: ("one.5.5", ME)}) == {}


def test_malformed_records_of_servers_are_skipped_with_a_warning(caplog):
    hostile = {
        "0OIl": {"runs": [0, 1], "pending_tasks": 0},
        7: {"runs": [0, 1], "pending_tasks": 0},
        OTHER: {"runs": [0, 2**61], "pending_tasks": 0},
    }
    rates = [{"runs": [0, 1], "pending_tasks": 0, "throughput_rows_per_s": rate} for rate in (None, "9", -1, math.inf)]
    pending = [{"runs": [0, 1], "pending_tasks": tasks} for tasks in (math.nan, 10**30)]
    for i, value in enumerate([1, [], {}, {"runs": [0, 1]}, *pending, *rates]):
        hostile[PeerID(b"%d" % i).to_base58()] = value  # type: ignore[assignment]
    found = {key: Record(value, 5.0) for key, value in hostile.items()}
    found[ME] = Record({"runs": [3, 2], "pending_tasks": 4, "throughput_rows_per_s": 9, "new": 1}, 6.0)
    found[THIRD] = Record(None, 7.0)
    servers = rec.read_hosted("key", found, PeerIDs())
    assert servers == {ALICE: rec.Hosted([3, 2], 4, 6.0, 9), CAROL: rec.Hosted((), math.inf, 7.0)}
    assert list(servers) == [ALICE, CAROL], "least loaded first"
    assert len(caplog.records) == len(hostile)


def found_of(*records: dict[rec.Place, Any], ends: float = 100.0) -> dict[str, dict[Any, Record]]:
    found: dict[str, dict[Any, Record]] = {DIRECTORY_KEY: {}}
    for some in records:
        for (key, subkey), value in some.items():
            found.setdefault(key, {})[subkey] = Record(value, ends)
    return found


def test_leaving_experts_are_replaced_by_tombstones_or_heirs():
    leaving = {"deep.1.2.3", "ffn.3.7", "one.5"}
    places = [place for place in rec.stock_records(leaving, ME) if place[1] is not None]
    mine = rec.stock_records(leaving, ME)
    planned = rec.replace_stock(leaving, places, found_of(mine), {}, ME)
    assert set(planned) == {("deep.1.2.", 3), ("deep.1.", 2), ("ffn.3.", 7), ("one.5.", FLAT_EXPERT)}
    assert all(record == Record(None, 100.0 + rec.TOMBSTONE_EDGE_S) for record in planned.values())

    others = rec.stock_records(["deep.1.2.9"], OTHER)
    found = found_of({**others, **mine})  # the other's deep.1.2. is there, ours names the shared prefix
    planned = rec.replace_stock(leaving, places, found, {"ffn.3.7": THIRD}, ME)
    assert planned["ffn.3.", 7].value == ("ffn.3.7", THIRD)
    assert planned["deep.1.2.", 3].value is None
    assert planned["deep.1.", 2].value == ("deep.1.2.9", OTHER)


def test_records_of_others_and_of_experts_that_stay_are_left_alone():
    leaving = {"deep.1.2.3"}
    places = [place for place in rec.stock_records(leaving, ME) if place[1] is not None]
    others = found_of(rec.stock_records(leaving, OTHER))
    assert rec.replace_stock(leaving, places, others, {}, ME) == {}
    staying = rec.stock_records(["deep.1.2.4"], ME)  # names the shared prefix
    planned = rec.replace_stock(leaving, places, found_of(rec.stock_records(leaving, ME), staying), {}, ME)
    assert set(planned) == {("deep.1.2.", 3)}
    assert rec.replace_stock(leaving, places, {key: {} for key, _ in places}, {}, ME) == {}


def test_own_facts_after_some_and_after_all_experts_have_left():
    facts = ServerInfo(version="7").to_plain()
    uids = ["ffn.3.7", "ffn.3.8", "ffn.4.0"]
    found = found_of(rec.own_records(uids, ME, facts), rec.own_records(["ffn.3.7"], OTHER, facts))
    planned = {place: record.value for place, record in rec.replace_own({"ffn.3.7", "ffn.4.0"}, found, ME).items()}
    assert planned == {
        (rec.hosted_key("ffn.3."), ME): {"runs": [8, 1], "pending_tasks": 0, "throughput_rows_per_s": 0.0},
        (rec.hosted_key("ffn.4."), ME): None,
        (DIRECTORY_KEY, ME): {**facts, "parts": 1},
        (rec.part_key(ME, 0), None): [["ffn.3.", [8, 1]]],
    }
    planned = {place: record.value for place, record in rec.replace_own(set(uids), found, ME).items()}
    assert planned[DIRECTORY_KEY, ME] == {**facts, "state": "offline", "parts": 0}
    assert planned[rec.hosted_key("ffn.3."), ME] is None
    assert rec.find_heirs({"ffn.3.7", "ffn.3.8"}, found, ME) == {"ffn.3.7": OTHER}


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([ME, OTHER, "ffn.3.7", "runs", "parts"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.sampled_from(["runs", "parts", "state", "pending_tasks"]) | st.text(max_size=3), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(
    values=st.lists(plain_values | st.tuples(plain_values, st.sampled_from([ME, OTHER])), min_size=12, max_size=12),
    ends=st.floats(allow_nan=True),
)
def test_whatever_others_write_in_its_place_a_server_can_take_its_experts_back(values: list[Any], ends: float):
    uids = ["ffn.3.7", "ffn.3.8", "one.5"]
    stock = rec.stock_records(uids, ME)
    places = [place for place in stock if place[1] is not None]
    mine = {**stock, **rec.own_records(uids, ME, ServerInfo(version="7").to_plain())}
    forged = dict(zip(mine, values))
    found = found_of({**mine, **forged}, ends=ends)
    for leaving in (set(uids), {"ffn.3.7"}):
        rec.replace_stock(leaving, places, found, rec.find_heirs(leaving, found, ME), ME)
        planned = rec.replace_own(leaving, found, ME)
        hosted = planned.get((rec.hosted_key("one."), ME))
        if hosted is not None and leaving == set(uids):
            assert hosted.value is None or 5 not in rec.expand(hosted.value["runs"])


FORGED = [
    {(rec.hosted_key("ffn.3."), ME): {"runs": "none"}},
    {(rec.hosted_key("ffn.3."), ME): {"runs": [0]}},
    {(rec.hosted_key("ffn.3."), ME): {}},
    {(DIRECTORY_KEY, ME): {"parts": 1}, (rec.part_key(ME, 0), None): {"no": "list"}},
    {(DIRECTORY_KEY, ME): {"parts": 1}, (rec.part_key(ME, 0), None): [["ffn.3.", [0, 2**61]]]},
    {("ffn.3.", 7): (["ffn.3.7"], ME)},
    {("ffn.3.", 7): ({}, ME)},
    {("ffn.3.", 7): ME},
    {("deep.1.2.", 3): (["deep.1.2.3"], ME), ("deep.1.", 2): (None, ME)},
]


@pytest.mark.parametrize("forged", FORGED)
def test_records_forged_in_our_name_keep_no_expert_from_being_retracted(forged):
    uids = ["ffn.3.7", "ffn.3.8", "ffn.4.0", "deep.1.2.3", "one.5"]
    facts = ServerInfo().to_plain()
    stock = {place: value for place, value in rec.stock_records(uids, ME).items() if place[1] is not None}
    found = found_of(stock, rec.own_records(uids, ME, facts), forged)
    planned, heirs = plan_retraction(uids, found, ME)
    after = {key: dict(records) for key, records in found.items()}
    for (key, subkey), record in planned.items():
        assert record.expiration_time > 100.0
        after[key][subkey] = record
    assert heirs == {}
    peer_ids = PeerIDs()
    for prefix in ("ffn.3.", "ffn.4.", "deep.1.2.", "deep.1.", "one.5."):
        assert rec.read_successors(prefix, after[prefix], peer_ids) == {}
    for prefix in rec.by_prefix(uids):
        assert [server.runs for server in rec.read_hosted(prefix, after[rec.hosted_key(prefix)], peer_ids).values()] in (
            [], [()]
        )  # fmt: skip


def test_what_costs_one_expert_its_plan_costs_the_others_nothing(monkeypatch):
    uids = [f"ffn.{i}.{j}" for i in range(3) for j in range(3)]
    found = found_of(rec.stock_records(uids, ME), rec.own_records([*uids, "stay.0"], ME, ServerInfo().to_plain()))
    found["ffn.1."][5] = Record(("ffn.1.5", OTHER), 100.0)
    expected, _ = plan_retraction([uid for uid in uids if uid != "ffn.1.1"], found, ME)
    honest = rec.replace_own

    def replace_own(leaving, found, me):
        if "ffn.1.1" in leaving:
            raise TypeError("unhashable")
        return honest(leaving, found, me)

    monkeypatch.setattr(moe.dht.experts, "replace_own", replace_own)
    planned, _ = plan_retraction(uids, found, ME)
    for place in set(expected) - {(DIRECTORY_KEY, ME), (rec.hosted_key("ffn.1."), ME)}:
        if place[0] != rec.part_key(ME, 0):
            assert planned[place].value == expected[place].value, place
    assert planned["ffn.1.", 1].value is None


# --- on real nodes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peers() -> Iterator[list[DHT]]:
    """Three nodes of one swarm."""
    started = [start_dht()]
    try:
        started += [start_dht(visible_addresses(started[0])) for _ in range(2)]
        yield started
    finally:
        for dht in started:
            stop_dht(dht)


@pytest.fixture
def own_dht() -> Iterator[DHT]:
    """A node of its own, to be mistreated."""
    dht = start_dht()
    yield dht
    with contextlib.suppress(ProcessLookupError):
        if dht.is_alive():
            os.kill(dht.pid, signal.SIGCONT)
    stop_dht(dht)


def hosts(dht: DHT, *uids: str, **kwargs: Any) -> list[list[PeerID]]:
    return [list(expert.peer_ids) if expert else [] for expert in find_experts(dht, uids, **kwargs)]


def stock_find(dht: DHT, *uids: str) -> list[PeerID | None]:
    """As hivemind's get_experts, which would also start its own event loop for RemoteExperts."""
    found = dht.run_coroutine(partial(stock_server._get_experts, uids=list(uids), expiration_time=None), True)
    return [expert.peer_id if expert else None for expert in found.result(timeout=30)]


def test_declare_and_find(peers):
    a, b, c = peers
    assert len(declare_experts(a, ["single.0", "single.1"])) == 4  # the counts of hivemind's test_dht_single_node
    stored = declare_experts(a, ["count.1.2.3", "count.1.2.4", "count.3.4.5"])
    assert len(stored) == 3 + 3 + 2
    assert all(stored.values())
    uids = [f"many.{i}" for i in range(50)]
    for start in range(0, 50, 10):
        assert all(declare_experts(b, uids[start : start + 10], get_dht_time() + 30).values())
    first, *middle, last = hosts(c, "foobar", *uids, "foo.0.123")
    assert first == last == []
    assert middle == [[b.peer_id]] * 50
    assert hosts(c, "many.3", "single.1", "many.3") == [[b.peer_id], [a.peer_id], [b.peer_id]]


def test_expiration_time(peers):
    a, _, c = peers
    until = get_dht_time() + 20
    declare_experts(a, ["short.0"], until, info=ServerInfo())
    assert hosts(c, "short.0", expiration_time=until - 1) == [[a.peer_id]]
    assert hosts(c, "short.0", expiration_time=until + 1) == [[]]
    (found,) = find_experts(c, ["short.0"])
    assert found is not None
    assert found.expiration_time == pytest.approx(until)
    declare_experts(a, ["short.1"], get_dht_time() + 1)
    eventually(lambda: hosts(c, "short.1") == [[]])
    assert set(declare_experts(a, ["short.2"], get_dht_time() - 1).values()) == {False}


def test_a_replica_is_announced_though_the_records_of_another_end_later(peers):
    a, b, c = peers
    declare_experts(a, ["replica.0"], get_dht_time() + 300, info=ServerInfo())
    announcer = Announcer(b, ["replica.0"], ServerInfo, 30.0, 60.0)
    announcer.start()
    assert sorted(hosts(c, "replica.0")[0]) == sorted([a.peer_id, b.peer_id])
    announcer.stop()
    assert hosts(c, "replica.0") == [[a.peer_id]]


def test_declaring_in_the_background(peers):
    future = declare_experts(peers[0], ["later.0.0"], wait=False)
    assert future.result(timeout=30) == {"later.0.0": True, ("later.0.", 0): True}  # type: ignore[union-attr]
    assert hosts(peers[1], "later.0.0") == [[peers[0].peer_id]]


@pytest.mark.parametrize(
    "uids", ["ffn.0", ["ffn.0", "ffn"], ["ffn.01"], [7], ["ffn.0."], [f"{'x' * 1000}{i}.0" for i in range(9000)]]
)
def test_bad_uids_are_refused(peers, uids):
    for function in (declare_experts, retract_experts):
        with pytest.raises(ConfigError):
            function(peers[0], uids)
    with pytest.raises(ValueError, match="Please send a list"):
        find_experts(peers[0], "ffn.0")


def test_nothing_to_do(peers):
    assert declare_experts(peers[0], []) == {}
    assert find_experts(peers[0], []) == []
    assert fetch_prefixes(peers[0], []) == {}
    retract_experts(peers[0], [])


def test_stock_readers_see_our_experts(peers):
    a, _, c = peers
    declare_experts(a, ["tostock.1.2", "tostock.1.3", "tostock1d.4"], info=ServerInfo())
    assert stock_find(c, "tostock.1.2", "tostock1d.4", "tostock.9.9") == [a.peer_id, a.peer_id, None]
    searcher = StockBeamSearcher(c, "tostock.", (4, 4), negative_caching=False)
    future = searcher.get_active_successors(["tostock.1.", "tostock.2."], return_future=True)
    expected = {2: ("tostock.1.2", a.peer_id), 3: ("tostock.1.3", a.peer_id)}
    assert future.result(timeout=30) == {"tostock.1.": expected, "tostock.2.": {}}
    future = StockBeamSearcher(c, "tostock1d.", (8,), negative_caching=False).get_initial_beam(range(8), 1, True)
    ((_, prefix, found),) = future.result(timeout=30)
    assert (prefix, found) == ("tostock1d.4.", {FLAT_EXPERT: ("tostock1d.4", a.peer_id)})


def test_we_see_experts_of_stock_servers(peers):
    a, _, c = peers
    stock_server.declare_experts(a, ["fromstock.1.2", "fromstock1d.4"], get_dht_time() + 30)
    assert hosts(c, "fromstock.1.2", "fromstock1d.4") == [[a.peer_id], [a.peer_id]]
    found = fetch_prefixes(c, ["fromstock.1.", "fromstock1d.4.", "fromstock.2."])
    assert {prefix: {i: s.expert for i, s in entries.items()} for prefix, entries in found.items()} == {
        "fromstock.1.": {2: ExpertInfo("fromstock.1.2", a.peer_id)},
        "fromstock1d.4.": {FLAT_EXPERT: ExpertInfo("fromstock1d.4", a.peer_id)},
        "fromstock.2.": {},
    }


def test_several_servers_of_one_expert(peers):
    a, b, c = peers
    declare_experts(a, ["shared.0.1"], get_dht_time() + 60, info=ServerInfo(pending_tasks=9))
    declare_experts(b, ["shared.0.1"], get_dht_time() + 70, info=ServerInfo(pending_tasks=5))
    assert hosts(c, "shared.0.1") == [[b.peer_id, a.peer_id]]
    # ours ends earlier than b's, so the stock record stays b's; we are found by our own word
    stored = declare_experts(a, ["shared.0.1"], get_dht_time() + 65, info=ServerInfo(pending_tasks=0))
    assert stored == {"shared.0.1": False, ("shared.0.", 1): False}
    assert hosts(c, "shared.0.1") == [[b.peer_id, a.peer_id]]
    retract_experts(b, ["shared.0.1"])
    assert hosts(c, "shared.0.1") == [[a.peer_id]]
    assert stock_find(a, "shared.0.1") == [a.peer_id], "b has handed its record over"
    assert fetch_prefixes(c, ["shared.0."])["shared.0."][1].expert.peer_id == a.peer_id
    retract_experts(a, ["shared.0.1"])
    assert hosts(c, "shared.0.1") == [[]]


def test_servers_of_blocks_with_their_load_and_speed(peers):
    a, b, c = peers
    ends = get_dht_time() + 60
    blocks = [f"row.{i}" for i in range(6)]
    declare_experts(a, blocks[:4], ends, info=ServerInfo(pending_tasks=3, throughput_rows_per_s=7.5))
    declare_experts(b, [*blocks[2:4], "other.1.2"], ends + 5, info=ServerInfo())
    declare_experts(b, blocks[5:], ends - 5)  # as a stock server: only the stock record

    def look(*uids: str) -> dict[str, ServerInfo]:
        return {server.peer_id: server for server in find_servers(c, uids) if server.peer_id is not None}

    found = look(*blocks, "row.9", "no uid")
    assert list(found) == sorted([a.peer_id.to_base58(), b.peer_id.to_base58()])
    first, second = found[a.peer_id.to_base58()], found[b.peer_id.to_base58()]
    assert first.uids == tuple(blocks[:4])
    assert (first.pending_tasks, first.throughput_rows_per_s) == (3, 7.5)
    assert first.expiration_time == pytest.approx(ends)
    assert second.uids == ("row.2", "row.3"), "the stock record of row.5 is not believed: its server says otherwise"
    assert look("row.4", "row.5") == {}
    assert look("row.1", "other.1.2").keys() == found.keys()
    retract_experts(a, blocks[:4])
    assert look(*blocks).keys() == {b.peer_id.to_base58()}
    retract_experts(b, blocks[2:4])
    assert find_servers(c, []) == find_servers(c, blocks) == []
    declare_experts(a, ["alone.0"], get_dht_time() + 30)
    assert look("alone.0").keys() == {a.peer_id.to_base58()}, "of a server that tells nothing else"
    with pytest.raises(ConfigError):
        find_servers(c, "row.1")


def test_round_trips(peers):
    a, b, _ = peers
    nobody = PeerID.from_base58("QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC").to_base58()
    measured = ping_peers(a, [b.peer_id.to_base58(), nobody, "no peer"])
    assert 0 < measured[b.peer_id.to_base58()] < 2
    assert measured[nobody] == measured["no peer"] == math.inf
    assert ping_peers(a, []) == {}


def test_retracted_experts_vanish_at_once_for_readers_that_have_seen_them(peers):
    a, b, c = peers
    uids = ["gone.0.1", "gone.0.2", "gone.1.0", "gone1d.7", "gone3d.1.2.3"]
    prefixes = ["gone.0.", "gone.1.", "gone1d.7.", "gone3d.1.", "gone3d.1.2."]
    declare_experts(a, uids, info=ServerInfo())
    for reader in (b, c):  # now their nodes remember
        assert hosts(reader, *uids) == [[a.peer_id]] * 5
        assert all(fetch_prefixes(reader, prefixes).values())
    retract_experts(a, uids)
    for reader in (a, b, c):
        assert hosts(reader, *uids) == [[]] * 5
        assert fetch_prefixes(reader, prefixes) == {prefix: {} for prefix in prefixes}
    fresh = start_dht(visible_addresses(a))
    try:
        assert stock_find(fresh, *uids) == [None] * 5
    finally:
        stop_dht(fresh)


@pytest.mark.parametrize("lifetime_s", [90.0, 20.0])
def test_declaring_again_after_a_retraction_works_at_once(peers, lifetime_s):
    a, b, c = peers
    uids = [f"again{lifetime_s:.0f}.1.2", f"again{lifetime_s:.0f}.3"]
    declare_experts(a, uids, get_dht_time() + 60, info=ServerInfo())
    assert hosts(c, *uids) == [[a.peer_id]] * 2
    retract_experts(a, uids)
    assert hosts(c, *uids) == [[]] * 2
    assert all(declare_experts(a, uids, get_dht_time() + lifetime_s, info=ServerInfo()).values())
    assert hosts(c, *uids) == [[a.peer_id]] * 2
    retract_experts(a, uids)
    assert all(declare_experts(b, uids, get_dht_time() + lifetime_s).values()), "another server takes over"
    assert hosts(c, *uids) == [[b.peer_id]] * 2


def test_retracting_leaves_others_alone(peers):
    a, b, c = peers
    declare_experts(a, ["mix.1.2.3", "mix.1.2.4"], get_dht_time() + 60)
    declare_experts(b, ["mix.1.2.5"], get_dht_time() + 50)
    declare_experts(b, ["mix.1.2.4"], get_dht_time() + 70)
    retract_experts(a, ["mix.1.2.3", "mix.1.2.4", "mix.9.9.9"])
    assert hosts(c, "mix.1.2.3", "mix.1.2.4", "mix.1.2.5") == [[], [b.peer_id], [b.peer_id]]
    found = fetch_prefixes(c, ["mix.1.", "mix.1.2."])
    assert found["mix.1."][2].expert.peer_id == b.peer_id
    assert {i: s.expert.peer_id for i, s in found["mix.1.2."].items()} == {4: b.peer_id, 5: b.peer_id}


def test_a_retraction_ends_a_declaration_under_way(peers):
    a, _, c = peers
    uids = [f"race.{i}.{j}" for i in range(8) for j in range(8)]
    errors: list[MoEError] = []

    def declare() -> None:
        try:
            declare_experts(a, uids, info=ServerInfo())
        except MoEError as e:
            errors.append(e)

    thread = threading.Thread(target=declare)
    thread.start()
    time.sleep(0.05)
    retract_experts(a, uids)
    thread.join()
    assert not errors or "cancelled" in str(errors[0])
    assert hosts(c, *uids) == [[]] * 64


def test_a_foreign_record_far_in_the_future_is_not_outbid(peers):
    a, _, c = peers
    for dht in peers:
        dht.store("blocked.1", value=None, expiration_time=get_dht_time() + 3600)
    stored = declare_experts(a, ["blocked.1"], info=ServerInfo())
    assert stored == {"blocked.1": False, ("blocked.1.", FLAT_EXPERT): True}
    assert hosts(c, "blocked.1") == [[a.peer_id]], "found by our own word"


def test_list_servers(peers):
    a, b, c = peers
    uids = [f"listed.{i % 3}.{i}" for i in range(60)]
    info = ServerInfo(version="9", device="cpu", addresses=("tcp://x:1",), started_at=5.0)
    declare_experts(a, uids, info=info)
    declare_experts(b, ["joining.0.0"], info=ServerInfo(state=ServerState.JOINING))

    def servers() -> dict[str, ServerInfo]:
        return {server.peer_id: server for server in list_servers(c) if server.peer_id is not None}

    listed = servers()[a.peer_id.to_base58()]
    assert listed.version == "9"
    assert listed.addresses == ("tcp://x:1",)
    assert sorted(listed.uids) == sorted(uids)
    assert listed.expiration_time is not None
    assert listed.expiration_time > get_dht_time()
    joining = servers()[b.peer_id.to_base58()]
    assert (joining.state, joining.uids) == (ServerState.JOINING, ("joining.0.0",))
    assert hosts(c, "joining.0.0") == [[]], "not before it is online"

    retract_experts(a, uids[1:])
    listed = servers()[a.peer_id.to_base58()]
    assert (listed.state, listed.uids) == (ServerState.ONLINE, ("listed.0.0",))
    assert hosts(c, uids[0], uids[1]) == [[a.peer_id], []]
    retract_experts(a, uids[:1])
    listed = servers()[a.peer_id.to_base58()]
    assert (listed.state, listed.uids, listed.version) == (ServerState.OFFLINE, (), "9")


async def store_garbage(node: Any, key: str, subkey: Any) -> None:
    """Bytes that are no value: hivemind's nodes take them, and its reads of them never end."""
    node.protocol.storage.store(DHTID.generate(key), b"\xc1", get_dht_time() + 30, subkey=subkey)


def test_hostile_records_do_no_harm(peers, caplog):
    a, b, c = peers
    declare_experts(a, ["attacked.1.2"], info=ServerInfo(version="good"))
    ends = get_dht_time() + 30
    for subkey, value in ((THIRD, {"state": 5}), ("no peer", {"state": "online"}), (OTHER, {"parts": 10**9})):
        b.store(DIRECTORY_KEY, value=value, subkey=subkey, expiration_time=ends)
    b.store(rec.hosted_key("attacked.1."), value={"runs": [0, 2**60]}, subkey=THIRD, expiration_time=ends)
    b.store("attacked.1.", value=("attacked.7.7", ME), subkey=5, expiration_time=ends)
    b.store("attacked.9", value=["not", "a", "peer"], expiration_time=ends)
    for dht in peers:
        call(dht, "storing garbage", store_garbage, "attacked.3", None)
        call(dht, "storing garbage", store_garbage, "attacked.2.", 5)
    versions = {server.peer_id: server.version for server in list_servers(c)}
    assert versions[a.peer_id.to_base58()] == "good"
    assert versions[OTHER] == ""
    assert THIRD not in versions
    assert hosts(c, "attacked.1.2", "attacked.9", "attacked.3") == [[a.peer_id], [], []]
    found = fetch_prefixes(c, ["attacked.1.", "attacked.2."])
    assert {prefix: list(entries) for prefix, entries in found.items()} == {"attacked.1.": [2], "attacked.2.": []}


def test_a_server_retracts_whatever_others_have_stored_in_its_name(peers):
    a, b, c = peers
    me, uids = a.peer_id.to_base58(), ["framed.1.2", "framed.1.3", "framed.2.0"]
    declare_experts(a, uids, info=ServerInfo(version="good"))
    ends = get_dht_time() + 120  # later than ours
    b.store(rec.hosted_key("framed.1."), value={"runs": ["x"]}, subkey=me, expiration_time=ends)
    b.store(DIRECTORY_KEY, value={"parts": 1, "state": "online"}, subkey=me, expiration_time=ends)
    b.store(rec.part_key(me, 0), value=[["framed.1.", [0]]], expiration_time=ends)
    b.store("framed.1.", value=(["framed.1.2"], me), subkey=2, expiration_time=ends)
    assert hosts(c, *uids)[-1] == [a.peer_id]
    retract_experts(a, uids)
    assert hosts(c, *uids) == [[], [], []]
    assert fetch_prefixes(c, ["framed.1.", "framed.2.", "framed."]) == {"framed.1.": {}, "framed.2.": {}, "framed.": {}}
    assert not [server for server in list_servers(c) if server.peer_id == me and server.state == ServerState.ONLINE]


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_experts_are_retracted_though_the_libp2p_daemon_has_died(peers, moment):
    own = start_dht(visible_addresses(peers[0]))
    try:
        uids = [f"orphan.1.{i}" for i in range(3)]
        declare_experts(own, uids, info=ServerInfo())
        assert hosts(peers[1], *uids) == [[own.peer_id]] * 3
        (daemon,) = psutil.Process(own.pid).children()
        daemon.terminate()
        if moment == "before":
            daemon.wait(10)
        retract_experts(own, uids)
        assert hosts(peers[1], *uids) == [[], [], []]
        assert psutil.Process(own.pid).children() == []  # nor does the one stay that has told them
    finally:
        stop_dht(own)


def test_without_the_libp2p_daemon_and_anybody_else_a_retraction_says_so(own_dht):
    declare_experts(own_dht, ["alone.0"], info=ServerInfo())
    (daemon,) = psutil.Process(own_dht.pid).children()
    daemon.kill()
    with pytest.raises(TransportError, match="no other peer is known"):
        retract_experts(own_dht, ["alone.0"], timeout_s=10)


def test_large_requests_do_not_kill_the_dht(peers):
    # hivemind's own declare_experts does with enough uids: its process takes a part of the request for the whole
    a, _, c = peers
    uids = [f"{'long' * 100}{i % 3}.{i}" for i in range(96)]
    assert all(declare_experts(a, uids, info=ServerInfo()).values())
    assert hosts(c, *uids) == [[a.peer_id]] * 96
    retract_experts(a, uids)
    assert hosts(c, *uids[:5]) == [[]] * 5


def test_many_threads_ask_at_once(peers):
    a, _, c = peers
    uids = [f"threads.{i}" for i in range(8)]
    declare_experts(a, uids)
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(5):
            found = hosts(c, *uids)
            if found != [[a.peer_id]] * 8:
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class RefusesExperts(RecordValidatorBase):  # type: ignore[misc]
    """A swarm's own rule: hivemind asks it for every record stored or read."""

    def validate(self, record: DHTRecord) -> bool:
        return b"forged" not in record.value


def test_record_validators_are_passed_on_and_refusals_reported():
    dht = start_dht(record_validators=[RefusesExperts()])
    try:
        assert declare_experts(dht, ["forged.1.2", "good.1"]) == {
            "forged.1.2": True,  # its value is the peer id
            ("forged.1.", 2): False,
            "good.1": True,
            ("good.1.", FLAT_EXPERT): True,
        }
        assert fetch_prefixes(dht, ["forged.1."]) == {"forged.1.": {}}
    finally:
        stop_dht(dht)


# --- the process -----------------------------------------------------------------------------------------------------


def test_addresses(peers):
    a, _, c = peers
    line = peers_line(a)
    assert line.startswith("--initial_peers /ip4/127.0.0.1/tcp/")
    assert line.endswith(f"/p2p/{a.peer_id.to_base58()}")
    assert tuple(line.split()[1:]) == visible_addresses(a)
    peer = visible_peer(a)
    assert peer.peer_id == a.peer_id
    assert tuple(map(str, peer.addrs)) == visible_addresses(a)
    assert visible_addresses(c) != visible_addresses(a)


def test_a_client_has_no_address():
    dht = start_dht(client_mode=True, no_listen=True)
    try:
        assert visible_addresses(dht) == ()
        assert peers_line(dht) == ""
    finally:
        stop_dht(dht)


def test_resolve_p2p(peers):
    async def identify() -> PeerID:
        p2p = await P2P.replicate(Multiaddr(resolve_p2p(peers[1])))
        peer_id = p2p.peer_id
        await p2p.shutdown()
        return peer_id

    assert asyncio.run(identify()) == peers[1].peer_id


def test_a_single_node_is_enough(own_dht):
    declare_experts(own_dht, ["alone.1.2"], info=ServerInfo())
    assert hosts(own_dht, "alone.1.2", "alone.1.3") == [[own_dht.peer_id], []]
    assert [server.uids for server in list_servers(own_dht)] == [("alone.1.2",)]
    retract_experts(own_dht, ["alone.1.2"])
    assert hosts(own_dht, "alone.1.2") == [[]]


def calls(dht: DHT) -> list[Callable[[], Any]]:
    """Everything that asks the DHT process."""
    return [
        lambda: declare_experts(dht, ["ffn.0.0"], timeout_s=0.3),
        lambda: retract_experts(dht, ["ffn.0.0"], timeout_s=0.3),
        lambda: find_experts(dht, ["ffn.0.0"], timeout_s=0.3),
        lambda: fetch_prefixes(dht, ["ffn.0."], timeout_s=0.3),
        lambda: list_servers(dht, timeout_s=0.3),
        lambda: peers_line(dht, timeout_s=0.3),
        lambda: resolve_p2p(dht, timeout_s=0.3),
    ]


def test_nothing_waits_for_a_stuck_dht(own_dht):
    os.kill(own_dht.pid, signal.SIGSTOP)
    for function in calls(own_dht):
        start = time.monotonic()
        with pytest.raises(CallTimeout, match=r"DHT: .* took longer than 0\.3 s"):
            function()
        assert time.monotonic() - start < 5
    for _ in range(100):  # until the pipe to it is full
        with pytest.raises(CallTimeout):
            resolve_p2p(own_dht, timeout_s=0.001)
    os.kill(own_dht.pid, signal.SIGCONT)
    assert resolve_p2p(own_dht, timeout_s=60).startswith("/unix/")


def test_a_stuck_dht_is_stopped_the_hard_way(own_dht):
    daemons = psutil.Process(own_dht.pid).children()
    os.kill(own_dht.pid, signal.SIGSTOP)
    stop_dht(own_dht, timeout_s=0.3)
    assert own_dht.exitcode == -signal.SIGKILL
    eventually(lambda: not any(is_running(daemon) for daemon in daemons))


def test_nothing_waits_for_a_dead_dht(own_dht):
    os.kill(own_dht.pid, signal.SIGKILL)
    own_dht.join()
    for function in calls(own_dht):
        with pytest.raises(LifecycleError, match=r"DHT: .* is not running \(exit code -9\)"):
            function()
    with pytest.raises(LifecycleError):
        declare_experts(own_dht, ["ffn.0.0"], wait=False)
    stop_dht(own_dht)


async def die(node: Any) -> None:
    os._exit(3)


def test_a_dht_that_dies_while_asked_is_noticed(own_dht):
    with pytest.raises(LifecycleError, match=r"DHT: dying: its process is not running \(exit code 3\)"):
        call(own_dht, "dying", die, timeout_s=60)


async def fail(node: Any) -> None:
    raise RuntimeError("no such luck")


def test_errors_inside_are_told(own_dht):
    with pytest.raises(TransportError, match="DHT: trying failed: RuntimeError: no such luck"):
        call(own_dht, "trying", fail)


def is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_an_answer_that_comes_as_a_poll_ends_is_not_lost():
    class JustLate:
        there = False

        def done(self) -> bool:
            return self.there

        def result(self, timeout: float) -> str:
            if not self.there:
                self.there = True
                raise concurrent.futures.TimeoutError  # of the poll; the answer comes before anybody looks again
            return "the answer"

    assert moe.dht.process._wait(None, "starting", JustLate(), time.monotonic() + 10.0) == "the answer"


def test_stopping_leaves_nothing():
    counts = []
    for _ in range(10):
        dht = start_dht()
        family = [psutil.Process(dht.pid), *psutil.Process(dht.pid).children(recursive=True)]
        assert len(family) == 2  # the node and its libp2p daemon
        visible_addresses(dht)
        stop_dht(dht)
        stop_dht(dht)
        assert not any(map(is_running, family))
        counts.append(psutil.Process().num_fds())
        with pytest.raises(LifecycleError):
            find_experts(dht, ["ffn.0.0"])
    assert counts[-1] <= counts[1] + 2, counts


def test_what_cannot_start_says_why_and_leaves_nothing():
    def children() -> set[int]:
        family = psutil.Process().children(recursive=True)
        return {child.pid for child in family if is_running(child) and child.name() != "torch_shm_manager"}

    before = children()
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
    with pytest.raises(LifecycleError, match=r"could not start: .*bootstrap"):
        start_dht([nobody])
    with pytest.raises(LifecycleError, match=r"could not start: .*no_such_option"):
        start_dht(no_such_option=1)
    with pytest.raises(LifecycleError, match=r"did not start within 0\.001 s"):
        start_dht(start_timeout_s=0.001)
    for bad in (
        "garbage",
        "/ip4/127.0.0.1/tcp/9",
        "/ip4/1.2.3/tcp/9/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC",
    ):
        with pytest.raises(ConfigError, match=bad):
            start_dht([nobody, bad])
    with pytest.raises(ConfigError):
        start_dht(nobody)
    eventually(lambda: children() <= before)


def test_a_dht_outlives_what_asks_processes_to_end(own_dht):
    """A supervisor may tell all processes of a server, a terminal its foreground group."""
    (daemon,) = psutil.Process(own_dht.pid).children()
    assert os.getpgid(own_dht.pid) == os.getpgid(daemon.pid) == own_dht.pid != os.getpgid(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(own_dht.pid, number)
        time.sleep(0.05)
        assert visible_addresses(own_dht)
    own_dht.terminate()  # but its parent may say so
    own_dht.join(10)
    assert not own_dht.is_alive()
    eventually(lambda: not is_running(daemon))


@pytest.mark.parametrize("how", ["import atexit", "dht.shutdown()", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_script_that_ends_takes_its_dht_along(how):
    """The interpreter asks its children to end, and waits for that."""
    program = f"""
import os, signal, moe.dht.process
dht = moe.dht.process.start_dht()
print(dht.pid, flush=True)
{how}
"""
    root = str(Path(__file__).resolve().parents[1])
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=root, timeout=60)
    node = int(ended.stdout)
    eventually(lambda: not psutil.pid_exists(node) or psutil.Process(node).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("moment", ["while it starts", "later"])
def test_a_dht_ends_with_a_killed_parent(moment):
    program = """
import os, sys, time
import moe.dht.process
wait = moe.dht.process._wait
def tell_and_wait(dht, *args):
    print(dht.pid, flush=True)
    return wait(dht, *args)
moe.dht.process._wait = tell_and_wait
dht = moe.dht.process.start_dht()
print("started", flush=True)
time.sleep(600)
"""
    root = str(Path(__file__).resolve().parents[1])
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        node = psutil.Process(int(parent.stdout.readline()))
        if moment == "later":
            while parent.stdout.readline() != b"started\n":
                pass
            assert len(node.children()) == 1
        family = [node, *node.children()]
        parent.kill()
    eventually(lambda: not any(map(is_running, family)))


def test_only_the_parent_may_stop_a_dht(own_dht, monkeypatch):
    monkeypatch.setattr(own_dht, "_parent_pid", 1)
    with pytest.raises(LifecycleError):
        stop_dht(own_dht)
    monkeypatch.undo()
    assert own_dht.is_alive()


# --- Announcer -------------------------------------------------------------------------------------------------------


def test_when_to_announce_next():
    assert next_announcement(100.0, 0, 30.0) == 130.0
    assert [next_announcement(0.0, n, 30.0) for n in range(1, 9)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert next_announcement(0.0, 10**6, 30.0) == 30.0
    assert next_announcement(0.0, 1, 0.2) == 0.2


class FakeDeclare:
    """Stands in for declare_experts and retract_experts."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple[Any, ...]] = []
        self.retracted: list[tuple[str, ...]] = []
        self.outcomes: list[Any] = []
        self.released = threading.Event()
        self.released.set()
        monkeypatch.setattr(moe.dht.announcer, "declare_experts", self.declare)
        monkeypatch.setattr(moe.dht.announcer, "retract_experts", self.retract)

    def declare(self, dht, uids, until, *, info, timeout_s):
        self.calls.append((uids, until - get_dht_time(), info))
        self.released.wait()
        outcome = self.outcomes.pop(0) if self.outcomes else {"ffn.0": True}
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def retract(self, dht, uids, timeout_s):
        self.retracted.append(tuple(uids))
        self.released.set()  # it ends a declaration under way


@pytest.fixture
def fake(monkeypatch) -> FakeDeclare:
    return FakeDeclare(monkeypatch)


def test_announces_and_retracts(fake):
    info = ServerInfo(pending_tasks=3)
    announcer = Announcer(None, ["ffn.0"], lambda: info, update_period_s=0.05, expiration_s=60.0)
    announcer.start()
    assert len(fake.calls) == 1
    assert fake.calls[0][0] == ("ffn.0",)
    assert fake.calls[0][1] == pytest.approx(60.0, abs=5)
    assert fake.calls[0][2] == info
    eventually(lambda: len(fake.calls) >= 3)
    with pytest.raises(LifecycleError):
        announcer.start()
    announcer.stop()
    announcer.stop()
    assert fake.retracted == [("ffn.0",)]
    statistics = announcer.statistics()
    assert (statistics.successes, statistics.failures, statistics.last_error) == (len(fake.calls), 0, None)
    assert statistics.last_success_age_s is not None
    assert "1 experts" in repr(announcer)
    with pytest.raises(LifecycleError):
        announcer.start()


def test_goes_on_after_failures(fake, caplog):
    refused = TransportError("every record was refused")
    fake.outcomes = [{"ffn.0": True}, CallTimeout("slow"), RuntimeError("a bug"), refused, {"ffn.0": True}]
    infos = iter([ServerInfo(), ServerInfo(), ServerInfo(), ServerInfo()])
    announcer = Announcer(None, ["ffn.0"], lambda: next(infos, ServerInfo()), 0.05, 60.0)
    announcer.start()
    eventually(lambda: announcer.statistics().successes >= 3)
    announcer.stop()
    assert announcer.statistics().failures == 3
    assert announcer.statistics().failures_in_a_row == 0
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == [
        "slow", "a bug", "every record was refused"
    ]  # fmt: skip


def test_a_failing_get_info_is_a_failed_announcement(fake):
    failures = iter([False, True, True])

    def get_info() -> ServerInfo:
        if next(failures, False):
            raise RuntimeError("not now")
        return ServerInfo()

    announcer = Announcer(None, ["ffn.0"], get_info, 0.05, 60.0)
    announcer.start()
    eventually(lambda: announcer.statistics().successes >= 2)
    announcer.stop()
    assert announcer.statistics().failures == 2


def test_the_first_announcement_must_succeed(fake):
    fake.outcomes = [LifecycleError("the DHT is gone")]
    announcer = Announcer(None, ["ffn.0"], ServerInfo, 0.05, 60.0)
    with pytest.raises(LifecycleError, match="the DHT is gone"):
        announcer.start()
    assert announcer.statistics().last_error == "LifecycleError: the DHT is gone"
    assert announcer.statistics().last_success_age_s is None
    with pytest.raises(ConfigError):
        Announcer(None, ["ffn"], ServerInfo)


def test_experts_are_hidden_and_shown_again(fake, caplog):
    announcer = Announcer(None, ["ffn.0"], ServerInfo, update_period_s=600.0, expiration_s=1200.0)
    announcer.start()
    announcer.hide()
    eventually(lambda: fake.retracted == [("ffn.0",)])
    announcer.announce()  # of what there is to tell; it does not show them
    assert len(fake.calls) == 1 and fake.retracted == [("ffn.0",)] * 2
    announcer.hide(False)
    eventually(lambda: len(fake.calls) == 2)
    announcer.stop()


def test_stopping_is_not_kept_by_a_retraction_that_fails(fake, monkeypatch, caplog):
    def fail(dht, uids, timeout_s):
        raise TypeError("unhashable")

    announcer = Announcer(None, ["ffn.0"], ServerInfo, 600.0, 1200.0)
    announcer.start()
    monkeypatch.setattr(moe.dht.announcer, "retract_experts", fail)
    announcer.stop()
    assert "could not retract 1 experts" in caplog.text


def test_announce_now(fake):
    announcer = Announcer(None, ["ffn.0"], ServerInfo, update_period_s=600.0, expiration_s=1200.0)
    announcer.start()
    announcer.announce_now()
    eventually(lambda: len(fake.calls) == 2)
    announcer.stop(retract=False)
    assert fake.retracted == []


def test_more_experts_are_announced_at_once_and_from_then_on(fake):
    announcer = Announcer(None, ["ffn.0"], ServerInfo, update_period_s=600.0, expiration_s=1200.0)
    announcer.start()
    announcer.add(["ffn.1", "ffn.2"])
    announcer.announce()
    assert [call[0] for call in fake.calls] == [("ffn.0",), *[("ffn.0", "ffn.1", "ffn.2")] * 2]
    announcer.remove(["ffn.0", "ffn.2"])
    assert fake.retracted == [("ffn.0", "ffn.2")]
    announcer.announce()
    assert fake.calls[-1][0] == ("ffn.1",)
    announcer.stop()
    assert fake.retracted[1:] == [("ffn.1",)]
    for change in (announcer.announce, lambda: announcer.add(["ffn.3"])):
        with pytest.raises(LifecycleError):
            change()
    assert fake.calls[-1][0] == ("ffn.1",)


def test_experts_that_cannot_be_announced_are_not_announced_further(fake):
    announcer = Announcer(None, ["ffn.0"], ServerInfo, update_period_s=600.0, expiration_s=1200.0)
    announcer.start()
    fake.outcomes = [CallTimeout("slow")]
    with pytest.raises(CallTimeout):
        announcer.add(["ffn.1"])
    with pytest.raises(ConfigError):
        announcer.add(["no uid"])
    announcer.announce()
    assert fake.calls[-1][0] == ("ffn.0",)
    announcer.stop()


def test_experts_are_hidden_only_when_no_announcement_of_them_is_under_way(fake):
    """One that began before would bring them back."""
    announcer = Announcer(None, ["ffn.0", "ffn.1"], ServerInfo, update_period_s=600.0, expiration_s=1200.0)
    announcer.start()
    fake.released.clear()
    announcer.announce_now()
    eventually(lambda: len(fake.calls) == 2)
    removal = threading.Thread(target=announcer.remove, args=(["ffn.1"],))
    removal.start()
    removal.join(0.1)
    assert fake.retracted == []
    fake.released.set()
    removal.join(10)
    assert fake.retracted == [("ffn.1",)]
    announcer.stop()


def test_an_announcer_without_experts_is_silent(fake):
    announcer = Announcer(None, [], ServerInfo, update_period_s=0.05, expiration_s=60.0)
    announcer.start()
    announcer.announce()
    assert fake.calls == []
    announcer.add(["ffn.0"])
    eventually(lambda: len(fake.calls) >= 2)
    announcer.stop()
    assert {call[0] for call in fake.calls} == {("ffn.0",)}


def test_stopping_does_not_wait_for_an_announcement_under_way(fake, caplog):
    announcer = Announcer(None, ["ffn.0"], ServerInfo, update_period_s=600.0, expiration_s=1200.0)
    announcer.start()
    fake.outcomes = [TransportError("cancelled")]
    fake.released.clear()
    announcer.announce_now()
    eventually(lambda: len(fake.calls) == 2)
    start = time.monotonic()
    announcer.stop(timeout_s=30.0)
    assert time.monotonic() - start < 15.0
    assert fake.retracted == [("ffn.0",)]
    assert not caplog.records


def test_keeps_experts_visible_on_a_real_dht(peers):
    a, _, c = peers
    tasks = iter(range(1000))
    announcer = Announcer(a, ["kept.0.1", "kept.7"], lambda: ServerInfo(pending_tasks=next(tasks)), 0.5, 3.0)
    announcer.start()
    assert hosts(c, "kept.0.1", "kept.7") == [[a.peer_id]] * 2
    time.sleep(4.0)
    assert hosts(c, "kept.0.1", "kept.7") == [[a.peer_id]] * 2
    (listed,) = [server for server in list_servers(c) if server.peer_id == a.peer_id.to_base58()]
    assert listed.pending_tasks > 1
    announcer.add(["kept.8"])
    assert announcer.are_visible(["kept.0.1", "kept.7", "kept.8"])
    assert hosts(c, "kept.8") == [[a.peer_id]]
    announcer.remove(["kept.7"])
    assert not announcer.are_visible(["kept.7", "kept.8"])
    before = announcer.statistics().successes
    eventually(lambda: announcer.statistics().successes >= before + 2)
    assert hosts(c, "kept.0.1", "kept.7", "kept.8") == [[a.peer_id], [], [a.peer_id]]
    announcer.stop()
    assert hosts(c, "kept.0.1", "kept.7", "kept.8") == [[]] * 3


def test_a_dead_dht_makes_stopping_no_slower(own_dht, caplog):
    announcer = Announcer(own_dht, ["ffn.0"], ServerInfo, update_period_s=600.0, expiration_s=1200.0)
    announcer.start()
    os.kill(own_dht.pid, signal.SIGKILL)
    own_dht.join()
    start = time.monotonic()
    announcer.stop(timeout_s=60.0)
    assert time.monotonic() - start < 20.0
    assert "could not retract" in caplog.text


@pytest.mark.parametrize("in_background", [False, True])
def test_nothing_is_announced_after_the_retraction(fake, in_background):
    """What there is to tell takes long to find out, and meanwhile the server stops: nobody would take it back."""
    asked, told = threading.Event(), threading.Event()
    announcer = Announcer(None, ["ffn.0"], ServerInfo, update_period_s=600.0, expiration_s=1200.0)
    announcer.start()

    def get_info():
        asked.set()
        assert told.wait(10.0)
        return ServerInfo()

    announcer.get_info = get_info
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        adding = None if in_background else other.submit(announcer.add, ["ffn.1"])
        announcer.announce_now()
        assert asked.wait(10.0)
        announcer.stop(timeout_s=0.5)
        assert "ffn.0" in fake.retracted[0]
        told.set()
        if adding is not None:
            with pytest.raises(LifecycleError):
                adding.result(10.0)
    assert announcer._thread is not None
    announcer._thread.join(10.0)
    assert len(fake.calls) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, CallTimeout])
def test_a_first_announcement_that_is_interrupted_is_taken_back(fake, error):
    """Some of it may have been stored by then."""
    fake.outcomes = [error("interrupted")]
    announcer = Announcer(None, ["ffn.0"], ServerInfo, 600.0, 1200.0)
    announcer.stop()
    assert fake.retracted == []
    announcer = Announcer(None, ["ffn.0"], ServerInfo, 600.0, 1200.0)
    with pytest.raises(error):
        announcer.start()
    announcer.stop()
    announcer.stop()
    assert fake.retracted == [("ffn.0",)]
