"""OnceWindow: a request id never trains twice, in bounded memory, and each peer has a window of its own; time is a number."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe.server.once
from moe.errors import Refused
from moe.server.once import ANSWER_BYTES, OnceWindow

ANNA, BERT = "anna", "bert"
SIZE = 10 * ANSWER_BYTES  # of an answer, most of it values
VALUES = SIZE - ANSWER_BYTES


def window(max_replies: int = 3, max_bytes: int = 10 * SIZE, window_s: float = 10.0) -> OnceWindow[str]:
    return OnceWindow(max_replies, max_bytes, window_s)


def train(once: OnceWindow[str], peer: str, *keys: object, at: float = 0.0, values: int | None = VALUES) -> None:
    for key in keys:
        once.begin(peer, key, f"{peer} {key}")
        once.finish(peer, key, values, at)
        once.check()


def known(once: OnceWindow[str], peer: str, *keys: object, at: float = 0.0) -> str:
    """For each id: y(es), its answer is kept; r(efused); n(o)."""
    found = ""
    for key in keys:
        try:
            found += "y" if once.find(peer, key, at) is not None else "n"
        except Refused:
            found += "r"
    return found


def test_a_repeat_finds_the_first_request_while_it_runs_and_when_it_is_done() -> None:
    once = window()
    assert once.find(ANNA, "id", 0.0) is None
    once.begin(ANNA, "id", "request")
    assert once.find(ANNA, "id", 1.0) == "request"
    once.finish(ANNA, "id", VALUES, 2.0)
    assert once.find(ANNA, "id", 3.0) == "request"
    assert once.find(BERT, "id", 3.0) is None
    assert repr(once) == f"OnceWindow(0 running, 1 answers of {SIZE} bytes)"


def test_a_request_that_failed_may_be_tried_again() -> None:
    once = window()
    once.begin(ANNA, "id", "first")
    once.abandon(ANNA, "id")
    assert once.find(ANNA, "id", 0.0) is None
    once.begin(ANNA, "id", "second")
    once.finish(ANNA, "id", 1, 0.0)
    assert once.find(ANNA, "id", 0.0) == "second"
    once.abandon(ANNA, "never begun")
    once.finish(ANNA, "never begun", 1, 0.0)
    once.abandon(BERT, "never begun")
    assert known(once, ANNA, "never begun") == "n"
    once.check()


def test_a_request_of_which_nobody_knows_whether_it_was_trained_is_not_tried_again() -> None:
    once = window()
    train(once, ANNA, "id", values=None)
    assert known(once, ANNA, "id") == "r"
    assert once.bytes == 0


def test_after_the_window_a_request_is_forgotten() -> None:
    once = window()
    once.begin(ANNA, "id", "request")
    assert once.find(ANNA, "id", 1000.0) == "request"  # as long as it runs it is known
    once.finish(ANNA, "id", VALUES, 1000.0)
    train(once, ANNA, "unknown", at=1000.0, values=None)
    assert known(once, ANNA, "id", "unknown", at=1009.9) == "yr"
    assert known(once, ANNA, "id", "unknown", at=1010.0) == "nn"
    assert repr(once) == "OnceWindow(0 running, 0 answers of 0 bytes)"
    assert not once._peers and not once._used


def test_what_peers_leave_behind_is_forgotten_although_they_do_not_come_back() -> None:
    once = window(max_replies=100, max_bytes=1000 * SIZE)
    for i in range(50):
        train(once, f"peer {i}", "id", at=float(i))
    once.find(ANNA, "id", 55.5)
    assert len(once._peers) == 4


@pytest.mark.parametrize("bounds", [{"max_replies": 2}, {"max_bytes": int(2.5 * SIZE)}])
def test_a_dropped_answer_is_refused_not_trained_again(bounds: dict[str, int]) -> None:
    once = window(**bounds)
    for i in range(4):
        train(once, ANNA, i, at=float(i))
    assert known(once, ANNA, *range(4), at=4.0) == "rryy"
    assert known(once, ANNA, 0, at=10.0) == "n"  # the window is over for it
    train(once, ANNA, 0, at=10.0)
    assert known(once, ANNA, 0, at=19.0) == "y"


def test_an_answer_too_large_to_keep_is_still_never_trained_twice() -> None:
    once = window(max_bytes=SIZE - 1)
    train(once, BERT, "small", values=1)
    train(once, ANNA, "large")
    assert known(once, ANNA, "large") == "r"
    assert known(once, BERT, "small") == "y"  # nobody else's answer makes room for it


# --- each peer's own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [0, 1, VALUES, 30 * SIZE, None])
@pytest.mark.parametrize("peers", [1, 4, 20])
def test_a_flood_of_others_ends_nobodys_window(monkeypatch: pytest.MonkeyPatch, values: int | None, peers: int) -> None:
    monkeypatch.setattr(moe.server.once, "MAX_REMEMBERED_IDS", 200)
    once = window(max_replies=100, max_bytes=100 * SIZE)
    train(once, ANNA, "a", "b")
    train(once, ANNA, "unknown", values=None)
    for i in range(2000):
        train(once, f"flood {i % peers}", i, at=1.0, values=values)
    assert known(once, ANNA, "a", "b", "unknown", at=2.0) == "yyr"
    assert once.bytes <= 100 * SIZE and once._ids <= 200
    assert known(once, f"flood {1999 % peers}", 0, at=2.0) == "n"  # it has hurt itself


def test_who_has_most_by_number_makes_room_for_who_has_most_by_bytes() -> None:
    once = window(max_replies=10, max_bytes=100 * SIZE)
    train(once, ANNA, "large", values=20 * SIZE)  # a fifth of the bytes, a tenth of the answers
    train(once, BERT, *range(30), values=1)
    assert known(once, ANNA, "large") == "y"
    assert known(once, BERT, *range(30)) == "r" * 21 + "y" * 9


def test_ids_without_answers_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe.server.once, "MAX_REMEMBERED_IDS", 50)
    once = window(max_replies=1)
    for i in range(1000):
        train(once, ANNA, i)
    own = once._peers[ANNA]
    assert (len(own.ids), len(own.answers), len(own.running)) == (50, 1, 0)
    assert max(len(once._most_ids._heap), len(once._most_answers._heap)) < 200
    assert known(once, ANNA, 999, 998, 950, 948) == "yrrn"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "finish", "lose", "abandon", "wait"]),
            st.sampled_from([ANNA, BERT]),
            st.integers(0, 4),
        ),
        max_size=80,
    )
)
def test_within_the_window_no_id_is_ever_trained_twice(steps: list[tuple[str, str, int]]) -> None:
    once, now = window(max_replies=2, max_bytes=3 * SIZE, window_s=5.0), 0.0
    running: set[tuple[str, int]] = set()
    trained: dict[tuple[str, int], float] = {}
    for step, peer, key in steps:
        own = peer, key
        if step == "wait":
            now += 1.0
        elif step == "ask":
            try:
                first = once.find(peer, key, now)
            except Refused:
                assert now < trained[own] + 5.0
                continue
            if first is None:
                assert own not in running
                assert own not in trained or now >= trained[own] + 5.0
                once.begin(peer, key, str(own))
                running.add(own)
            else:
                assert first == str(own)
        elif own in running:
            running.discard(own)
            if step == "abandon":
                once.abandon(peer, key)
            else:
                trained[own] = now
                once.finish(peer, key, VALUES + key * ANSWER_BYTES if step == "finish" else None, now)
        once.check()
