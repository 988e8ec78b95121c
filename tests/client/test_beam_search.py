"""The search against exhaustive search, its memory on a fake clock, the searcher on a fake DHT and on a real one."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.client import beam_search
from moe.client.beam_search import Branch, GridSearch, MoEBeamSearcher, PrefixCache
from moe.dht import (
    DHT,
    PeerID,
    Successor,
    Successors,
    declare_experts,
    get_dht_time,
    retract_experts,
    start_dht,
    stop_dht,
    visible_addresses,
)
from moe.errors import CallTimeout, ConfigError, LifecycleError, NoExpertsFound
from moe.expert_uid import FLAT_EXPERT, ExpertInfo, ExpertPrefix, coordinates, split_uid

ALICE = PeerID(b"alice")
BOB = PeerID(b"bob")
FOREVER = 1e12


class FakeSwarm:
    """The prefixes of a DHT in memory, and how often they are asked for."""

    def __init__(self, uids, peer_id: PeerID = ALICE, expiration_time: float = FOREVER):
        self.prefixes: dict[ExpertPrefix, Successors] = {}
        self.requests: list[list[ExpertPrefix]] = []
        self.failure: Exception | None = None
        for uid in uids:
            self.add(uid, peer_id, expiration_time)

    def add(self, uid: str, peer_id: PeerID = ALICE, expiration_time: float = FOREVER) -> None:
        successor = Successor(ExpertInfo(uid, peer_id), expiration_time)
        prefix, coordinate = split_uid(uid) if uid.count(".") > 1 else (f"{uid}.", FLAT_EXPERT)
        self.prefixes.setdefault(prefix, {})[coordinate] = successor
        while prefix.count(".") > 2:
            prefix, coordinate = split_uid(prefix)
            self.prefixes.setdefault(prefix, {})[coordinate] = successor

    def fetch(self, dht, prefixes, timeout_s, *, num_workers=None) -> dict[ExpertPrefix, Successors]:
        self.requests.append(list(prefixes))
        if self.failure is not None:
            raise self.failure
        return {prefix: dict(self.prefixes.get(prefix, {})) for prefix in prefixes}


def all_uids(prefix: str, grid: tuple[int, ...], density: float = 1.0, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    paths = itertools.product(*map(range, grid))
    return [prefix + ".".join(map(str, path)) for path in paths if rng.random() < density]


def exhaustive(uids, scores, row: int, beam_size: int) -> list[tuple[float, str]]:
    """The definition of the right answer."""
    scored = []
    for uid in uids:
        path = coordinates(uid)
        score = 0.0
        for dimension, coordinate in zip(scores, path):
            score = score + dimension[row][coordinate] if dimension is not scores[0] else dimension[row][coordinate]
        if score > -np.inf:
            scored.append((-score, path, uid))
    return [(-score, uid) for score, _, uid in sorted(scored)[:beam_size]]


def run(search: GridSearch, swarm: FakeSwarm, grid: tuple[int, ...], width: int | None = None) -> set[ExpertPrefix]:
    """Feed a search until it is done; the prefixes it asked for."""
    asked: set[ExpertPrefix] = set()
    while wanted := search.wanted(width):
        assert len(set(wanted)) == len(wanted)
        assert not asked & set(wanted), "asked for the same prefix twice"
        asked |= set(wanted)
        search.feed({prefix: Branch.of(prefix, swarm.prefixes.get(prefix, {}), grid) for prefix in wanted})
    return asked


# --- GridSearch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(9,), (5, 8), (4, 3, 5), (2, 3, 2, 3)])
@pytest.mark.parametrize("density", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("beam_size", [1, 4, 200])
def test_finds_what_exhaustive_search_finds(grid, density, beam_size):
    uids = all_uids("ffn.", grid, density)
    rng = np.random.default_rng(1)
    scores = [rng.normal(size=(6, size)) for size in grid]
    search = GridSearch("ffn.", scores, beam_size)
    run(search, FakeSwarm(uids), grid)
    for row, best in enumerate(search.best()):
        assert [(found.score, found.expert.uid) for found in best] == exhaustive(uids, scores, row, beam_size)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_exact_for_any_grid_any_swarm_and_equal_scores(data):
    grid = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3), "grid"))
    paths = list(itertools.product(*map(range, grid)))
    alive = data.draw(st.lists(st.sampled_from(paths), unique=True), "alive")
    uids = ["e." + ".".join(map(str, path)) for path in alive]
    rows = data.draw(st.integers(1, 3), "rows")
    score = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.1, 0.2, 0.3, -np.inf]), st.floats(-1e3, 1e3))
    scores = [
        np.array(data.draw(st.lists(score, min_size=rows * n, max_size=rows * n), "scores")).reshape(rows, n)
        for n in grid
    ]
    beam_size = data.draw(st.integers(1, 6), "beam_size")
    search = GridSearch("e.", scores, beam_size)
    run(search, FakeSwarm(uids), grid, data.draw(st.integers(1, 5), "width"))
    for row, best in enumerate(search.best()):
        assert [(found.score, found.expert.uid) for found in best] == exhaustive(uids, scores, row, beam_size)


def test_the_best_expert_need_not_be_below_the_best_first_coordinate():
    # hivemind's beam of 1 goes to ffn.0. and never sees ffn.1.1
    scores = [np.array([[1.0, 0.9]]), np.array([[0.0, 5.0]])]
    search = GridSearch("ffn.", scores, beam_size=1)
    run(search, FakeSwarm(["ffn.0.0", "ffn.1.1"]), (2, 2))
    assert [[found.expert.uid for found in row] for row in search.best()] == [["ffn.1.1"]]


def test_a_full_grid_costs_few_prefixes():
    grid = (256, 64)
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=(1, size)) for size in grid]
    asked = run(GridSearch("ffn.", scores, beam_size=4), FakeSwarm(all_uids("ffn.", grid)), grid)
    assert len(asked) <= 32  # 4 with this seed


def test_equal_scores_do_not_make_it_look_everywhere():
    grid = (64, 4)
    search = GridSearch("ffn.", [np.zeros((3, 64)), np.zeros((3, 4))], beam_size=4)
    asked = run(search, FakeSwarm(all_uids("ffn.", grid)), grid)
    assert asked <= {"ffn.0.", "ffn.1.", "ffn.2.", "ffn.3."}
    assert [found.expert.uid for found in search.best()[2]] == ["ffn.0.0", "ffn.0.1", "ffn.0.2", "ffn.0.3"]


def test_fewer_live_experts_than_asked_for():
    scores = [np.zeros((1, 3)), np.zeros((1, 3))]
    search = GridSearch("ffn.", scores, beam_size=5)
    run(search, FakeSwarm(["ffn.0.0", "ffn.2.1"]), (3, 3))
    assert [found.expert.uid for found in search.best()[0]] == ["ffn.0.0", "ffn.2.1"]


def test_no_rows_and_no_experts():
    grid = (2, 2)
    empty = GridSearch("ffn.", [np.empty((0, 2)), np.empty((0, 2))], beam_size=2)
    assert run(empty, FakeSwarm([]), grid) == set()
    assert empty.best() == []
    nobody = GridSearch("ffn.", [np.zeros((2, 2)), np.zeros((2, 2))], beam_size=2)
    assert run(nobody, FakeSwarm([]), grid) == {"ffn.0.", "ffn.1."}
    assert nobody.best() == [[], []]


def test_what_is_not_of_this_grid_is_left_out():
    swarm = FakeSwarm(["ffn.0.1", "ffn.1.7", "ffn.1.0.3", "ffn.1", "ffn.9.0"])
    search = GridSearch("ffn.", [np.zeros((1, 2)), np.zeros((1, 2))], beam_size=9)
    run(search, swarm, (2, 2))
    assert [found.expert.uid for found in search.best()[0]] == ["ffn.0.1"]
    flat = GridSearch("ffn.", [np.zeros((1, 2))], beam_size=9)
    run(flat, swarm, (2,))
    assert [found.expert.uid for found in flat.best()[0]] == ["ffn.1"]


# --- PrefixCache -----------------------------------------------------------------------------------------------------


def successors(*uids: str, peer_id: PeerID = ALICE, ends: float = FOREVER) -> Successors:
    return {split_uid(uid)[1]: Successor(ExpertInfo(uid, peer_id), ends) for uid in uids}


def test_live_prefixes_are_believed_for_a_while_and_until_one_of_them_ends():
    cache = PrefixCache((2, 9), max_age_s=3.0, absent_age_s=30.0)
    cache.put("ffn.0.", successors("ffn.0.1"), now=100.0)
    cache.put("ffn.1.", {**successors("ffn.1.1"), **successors("ffn.1.2", ends=101.0)}, now=100.0)
    assert cache.get("ffn.0.", 102.9) is not None
    assert cache.get("ffn.0.", 103.0) is None
    assert cache.get("ffn.1.", 100.9) is not None
    assert cache.get("ffn.1.", 101.0) is None
    assert cache.get("ffn.0.", 99.0) is None  # the clock was set back


def test_absent_prefixes_are_believed_longer_but_not_blindly():
    cache = PrefixCache((2, 9), max_age_s=3.0, absent_age_s=30.0)
    cache.put("ffn.0.", {}, now=100.0)
    assert cache.get("ffn.0.", 129.9) is not None
    assert cache.get("ffn.0.", 130.0) is None
    assert cache.get("ffn.0.", 102.0, believe_absent=False) is not None
    assert cache.get("ffn.0.", 103.0, believe_absent=False) is None
    no_negative_caching = PrefixCache((2, 9), max_age_s=3.0, absent_age_s=0.0)
    no_negative_caching.put("ffn.0.", {}, now=100.0)
    assert no_negative_caching.get("ffn.0.", 100.0) is None


def test_a_failed_expert_is_hidden_until_it_is_announced_again():
    cache = PrefixCache((2, 9), max_age_s=3.0, absent_age_s=30.0)
    cache.put("ffn.0.", successors("ffn.0.1", "ffn.0.2", ends=200.0), now=100.0)
    cache.forget("ffn.0.1")
    assert cache.get("ffn.0.", 100.0) is None
    known = cache.put("ffn.0.", successors("ffn.0.1", "ffn.0.2", ends=200.0), now=101.0)
    assert list(known.successors) == [2], "the same record again"
    known = cache.put("ffn.0.", successors("ffn.0.1", ends=230.0), now=102.0)
    assert list(known.successors) == [1], "announced again"
    cache.forget("ffn.0.1")
    known = cache.put("ffn.0.", successors("ffn.0.1", peer_id=BOB, ends=150.0), now=103.0)
    assert list(known.successors) == [1], "another server"


def test_forgetting_drops_all_prefixes_on_the_way_but_hides_no_other_expert():
    swarm = FakeSwarm(["e.0.1.2", "e.0.1.3", "f.5"])
    deep = PrefixCache((2, 2, 9), 3.0, 30.0)
    for prefix in ("e.0.", "e.0.1."):
        deep.put(prefix, swarm.prefixes[prefix], now=0.0)
    deep.forget("e.0.1.3")
    assert len(deep) == 0
    assert list(deep.put("e.0.", swarm.prefixes["e.0."], now=1.0).successors) == [1]  # the example of this prefix
    assert list(deep.put("e.0.1.", swarm.prefixes["e.0.1."], now=1.0).successors) == [2]
    flat = PrefixCache((9,), 3.0, 30.0)
    flat.put("f.5.", swarm.prefixes["f.5."], now=0.0)
    flat.forget("f.5")
    assert flat.put("f.5.", swarm.prefixes["f.5."], now=1.0).successors == {}
    flat.forget("f.6")  # never seen


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(beam_search, "MAX_CACHED_PREFIXES", 10)
    cache = PrefixCache((100, 9), max_age_s=3.0, absent_age_s=30.0)
    for i in range(100):
        cache.put(f"ffn.{i}.", {}, now=float(i))
        assert len(cache) <= 10
        assert cache.get(f"ffn.{i}.", float(i)) is not None


# --- MoEBeamSearcher on a fake DHT -------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(beam_search, "get_dht_time", clock)
    return clock


@pytest.fixture
def make(monkeypatch, clock):
    def make(uids, *args, **kwargs) -> tuple[MoEBeamSearcher, FakeSwarm]:
        swarm = FakeSwarm(uids)
        monkeypatch.setattr(beam_search, "fetch_prefixes", swarm.fetch)
        return MoEBeamSearcher(None, *args, **kwargs), swarm

    return make


def uids_of(rows) -> list[list[str]]:
    return [[info.uid for info in row] for row in rows]


def test_one_look_up_for_all_rows_and_none_while_it_is_remembered(make, clock):
    grid = (4, 16)
    uids = all_uids("ffn.", grid, 0.5)
    searcher, swarm = make(uids, "ffn", grid)
    rng = np.random.default_rng(2)
    scores = [rng.normal(size=(64, size)) for size in grid]
    for _ in range(3):
        found = searcher.search(scores, beam_size=4)
        assert uids_of(found) == [[uid for _, uid in exhaustive(uids, scores, row, 4)] for row in range(64)]
    assert [sorted(request) for request in swarm.requests] == [[f"ffn.{i}." for i in range(4)]]
    clock.now += 2.9
    searcher.search(scores, 4)
    assert len(swarm.requests) == 1
    clock.now += 0.2
    searcher.search(scores, 4)
    assert len(swarm.requests) == 2


def test_three_dimensions_sparse_in_a_batch(make):
    # hivemind's batch search raised TypeError here as soon as a prefix was missing (features.md P-B 12)
    grid = (3, 4, 5)
    uids = all_uids("ffn.", grid, 0.1)
    searcher, swarm = make(uids, "ffn.", grid)
    rng = np.random.default_rng(3)
    scores = [rng.normal(size=(7, size)) for size in grid]
    found = searcher.search([torch.tensor(dimension) for dimension in scores], beam_size=4)
    assert uids_of(found) == [[uid for _, uid in exhaustive(uids, scores, row, 4)] for row in range(7)]
    assert len(swarm.requests) <= 4
    assert len(set(itertools.chain(*swarm.requests))) == sum(map(len, swarm.requests))


def test_absent_prefixes_are_remembered_here_and_new_experts_still_appear(make, clock):
    searcher, swarm = make(["ffn.0.0"], "ffn", (2, 2))
    scores = [np.zeros((1, 2)), np.zeros((1, 2))]
    assert uids_of(searcher.search(scores, 4)) == [["ffn.0.0"]]
    swarm.add("ffn.1.1")
    clock.now += 5.0
    assert uids_of(searcher.search(scores, 4)) == [["ffn.0.0"]]  # a second expert may take up to cache_expiration
    assert swarm.requests[-1] == ["ffn.0."]
    clock.now += 26.0
    assert uids_of(searcher.search(scores, 4)) == [["ffn.0.0", "ffn.1.1"]]


def test_a_row_is_not_left_empty_because_of_an_old_memory(make, clock):
    searcher, swarm = make([], "ffn", (2,))
    scores = [np.zeros((1, 2))]
    assert uids_of(searcher.search(scores, 1)) == [[]]
    swarm.add("ffn.1")
    assert uids_of(searcher.search(scores, 1)) == [[]]
    clock.now += 3.1
    assert uids_of(searcher.search(scores, 1)) == [["ffn.1"]]


def test_without_negative_caching_absent_prefixes_are_asked_for_again(make):
    searcher, swarm = make(["ffn.0.0"], "ffn", (2, 2), negative_caching=False)
    scores = [np.zeros((1, 2)), np.zeros((1, 2))]
    searcher.search(scores, 4)
    searcher.search(scores, 4)
    assert swarm.requests == [["ffn.0.", "ffn.1."], ["ffn.1."]]


def test_a_failed_expert_is_replaced_by_the_next_best(make):
    searcher, _swarm = make(["ffn.0.0", "ffn.0.1", "ffn.1.0"], "ffn", (2, 2))
    scores = [np.array([[1.0, 0.0]]), np.array([[1.0, 0.5]])]
    assert uids_of(searcher.search(scores, 2)) == [["ffn.0.0", "ffn.0.1"]]
    searcher.forget("ffn.0.0")
    assert uids_of(searcher.search(scores, 2)) == [["ffn.0.1", "ffn.1.0"]]


def test_look_ups_are_limited(make, caplog):
    searcher, swarm = make(["ffn.63"], "ffn", (64,), max_lookups=10)
    assert uids_of(searcher.search([np.arange(64.0)[None, ::-1]], 4)) == [[]]
    assert sum(map(len, swarm.requests)) == 10
    assert "looked up 10 prefixes" in caplog.text
    assert uids_of(searcher.search([np.arange(64.0)[None]], 4)) == [["ffn.63"]]


def test_time_is_limited_and_errors_are_not_swallowed(make):
    searcher, swarm = make(["ffn.0.0"], "ffn", (2, 2))
    scores = [np.zeros((1, 2)), np.zeros((1, 2))]
    with pytest.raises(CallTimeout):
        searcher.search(scores, 1, timeout_s=0.0)
    swarm.failure = LifecycleError("the DHT is gone")
    with pytest.raises(LifecycleError):
        searcher.search(scores, 1)
    swarm.failure = None
    assert uids_of(searcher.search(scores, 1)) == [["ffn.0.0"]]


def test_methods_of_hivemind(make):
    searcher, _swarm = make(["e.0.1.2", "e.0.1.3", "e.2.0.0", "e.2.0.9"], "e", (3, 2, 5))
    beam = searcher.get_initial_beam([0.1, 0.9, 0.5], beam_size=2)
    assert [(score, prefix, sorted(found)) for score, prefix, found in beam] == [(0.5, "e.2.", [0]), (0.1, "e.0.", [1])]
    assert all(isinstance(info, ExpertInfo) for _, _, found in beam for info in found.values())
    assert len(searcher.get_initial_beam([0.1, 0.9, 0.5], beam_size=1)) == 1
    active = searcher.get_active_successors(["e.2.0.", "e.1.", "e.0.1."])
    assert {prefix: sorted(found) for prefix, found in active.items()} == {
        "e.2.0.": [0, 9],
        "e.1.": [],
        "e.0.1.": [2, 3],
    }
    assert sorted(searcher.get_active_successors(["e.2.0."], grid_size=5)["e.2.0."]) == [0]
    assert searcher.get_active_successors(["e.2.0."])["e.2.0."][9] == ExpertInfo("e.2.0.9", ALICE)


def test_futures(make):
    searcher, swarm = make(["ffn.0.0"], "ffn", (2, 2))
    assert list(searcher.get_active_successors(["ffn.0."], return_future=True).result(timeout=10)["ffn.0."]) == [0]
    assert len(searcher.get_initial_beam([0.0, 1.0], 4, return_future=True).result(timeout=10)) == 1
    swarm.failure = LifecycleError("the DHT is gone")
    with pytest.raises(LifecycleError):
        searcher.get_active_successors(["ffn.1.5."], return_future=True).result(timeout=10)


def test_many_threads_share_a_searcher(make):
    grid = (4, 8)
    uids = all_uids("ffn.", grid, 0.7)
    searcher, _swarm = make(uids, "ffn", grid, max_age_s=1e-9)
    rng = np.random.default_rng(4)
    scores = [rng.normal(size=(5, size)) for size in grid]
    expected = [[uid for _, uid in exhaustive(uids, scores, row, 3)] for row in range(5)]
    wrong: list[object] = []

    def work() -> None:
        for _ in range(20):
            found = uids_of(searcher.search(scores, 3))
            if found != expected:
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("scores", "beam_size"),
    [
        ([np.zeros((2, 2))], 1),
        ([np.zeros((2, 2)), np.zeros((2, 4))], 1),
        ([np.zeros((2, 2)), np.zeros((3, 3))], 1),
        ([np.zeros(2), np.zeros(3)], 1),
        ([], 1),
        ([np.zeros((2, 2)), np.zeros((2, 3))], 0),
        ([np.full((2, 2), np.nan), np.zeros((2, 3))], 1),
        ([np.full((2, 2), np.inf), np.zeros((2, 3))], 1),
    ],
)
def test_bad_scores_are_refused(make, scores, beam_size):
    searcher, _swarm = make(["ffn.0.0"], "ffn", (2, 3))
    with pytest.raises(ConfigError):
        searcher.search(scores, beam_size)


def test_bad_settings_are_refused(make):
    for prefix, grid in (("", (2,)), ("f.1.x", (2,)), ("ffn.3.", (2,)), ("ffn", ()), ("ffn", (0, 2)), ("ffn", (2, -1))):
        with pytest.raises(ConfigError):
            MoEBeamSearcher(None, prefix, grid)
    with pytest.raises(TypeError):
        MoEBeamSearcher(None, "ffn", (2,), cache_expiraton=3)  # type: ignore[call-arg]
    searcher, _swarm = make([], "ffn", (2, 2))
    assert searcher.uid_prefix == "ffn."
    for prefixes in ("ffn.", ["ffn"], ["ffn.0"]):
        with pytest.raises(ConfigError):
            searcher.get_active_successors(prefixes)


def test_the_error_for_nobody_says_what_was_looked_for(make):
    searcher, _swarm = make(["ffn.0.77"], "ffn", (2, 2))
    searcher.search([np.zeros((1, 2)), np.zeros((1, 2))], 1)
    error = searcher.no_experts_found()
    assert isinstance(error, NoExpertsFound)
    assert str(error) == (
        "no live experts ffn.[0:2].[0:2] in the DHT: looked up 2 prefixes, 1 of which have live successors, at 1 peers"
    )


# --- on a real DHT ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peers() -> Iterator[list[DHT]]:
    started = [start_dht()]
    try:
        addresses = visible_addresses(started[0])
        started += [start_dht(addresses) for _ in range(2)]
        yield started
    finally:
        for dht in started:
            stop_dht(dht)


@pytest.mark.parametrize("grid", [(12,), (4, 8), (3, 3, 3)])
def test_finds_the_best_of_a_real_swarm(peers, grid):
    name = f"real{len(grid)}"
    uids = all_uids(f"{name}.", grid, 0.5, seed=5)
    half = len(uids) // 2
    declare_experts(peers[0], uids[:half])
    declare_experts(peers[1], uids[half:])
    searcher = MoEBeamSearcher(peers[2], name, grid)
    rng = np.random.default_rng(6)
    scores = [rng.normal(size=(8, size)) for size in grid]
    found = searcher.search(scores, beam_size=4)
    assert uids_of(found) == [[uid for _, uid in exhaustive(uids, scores, row, 4)] for row in range(8)]
    hosts = {uid: peers[i >= half].peer_id for i, uid in enumerate(uids)}
    assert all(info.peer_id == hosts[info.uid] for row in found for info in row)


def test_returns_remote_experts(peers):
    declare_experts(peers[0], ["remote.0.1", "remote.1.0"])
    searcher = MoEBeamSearcher(peers[2], "remote", (2, 2))
    scores = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]], requires_grad=True)
    (batch,) = searcher.batch_find_best_experts(scores, beam_size=4)
    alone = searcher.find_best_experts([dimension[0] for dimension in scores], beam_size=1)
    later = searcher.batch_find_best_experts(scores, beam_size=1, return_future=True).result(timeout=30)
    assert [expert.uid for expert in batch] == ["remote.0.1", "remote.1.0"]
    assert [expert.uid for expert in alone] == [expert.uid for expert in later[0]] == ["remote.0.1"]
    assert alone[0].peer_id == peers[0].peer_id


def test_stock_negative_caching_does_not_hide_new_experts(peers):
    # hivemind's clients store "nobody" under the very subkey of a 1-D expert, for minutes (features.md P-B 37)
    for dht in peers:
        dht.store("late.3.", value=None, subkey=FLAT_EXPERT, expiration_time=get_dht_time() + 300)
    searcher = MoEBeamSearcher(peers[2], "late", (4,), max_age_s=0.1)
    scores = [np.zeros((1, 4))]
    assert uids_of(searcher.search(scores, 1)) == [[]]
    assert declare_experts(peers[0], ["late.3"]) == {"late.3": True, ("late.3.", FLAT_EXPERT): True}
    deadline = time.monotonic() + 30
    while uids_of(searcher.search(scores, 1)) != [["late.3"]]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    retract_experts(peers[0], ["late.3"])
    while uids_of(searcher.search(scores, 1)) != [[]]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
