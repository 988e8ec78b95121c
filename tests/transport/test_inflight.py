"""Bytes in flight: bounds of one and all, reasons, and that everything is given back exactly once."""

from __future__ import annotations

import threading

import pytest

from moe.errors import Overloaded
from moe.transport.inflight import InflightBytes


def test_all_peers_together_fit_into_the_bound() -> None:
    inflight = InflightBytes(100, 60)
    inflight.reserve("a", 60, "request")
    with pytest.raises(Overloaded, match="60 bytes of requests"):
        inflight.reserve("b", 41, "request")
    assert (inflight.bytes, inflight.bytes_of("a"), inflight.bytes_of("b")) == (60, 60, 0)


def test_a_peer_has_its_share_and_always_one_request() -> None:
    inflight = InflightBytes(100, 30)
    only = inflight.reserve("a", 20, "request")
    only.grow(70)  # larger than the share, but the only one
    with pytest.raises(Overloaded, match="90 bytes of your requests"):
        inflight.reserve("a", 1, "request")
    assert inflight.over_share("a")
    inflight.reserve("b", 10, "request")  # others do not notice
    only.done_with("request")
    assert inflight.bytes == 10 and not inflight.over_share("a")


def test_what_failed_to_be_reserved_leaves_no_trace() -> None:
    inflight = InflightBytes(10, 10)
    for _ in range(3):
        with pytest.raises(Overloaded):
            inflight.reserve("a", 11, "request")
    inflight.reserve("a", 10, "request").done_with("request")
    assert inflight.bytes == 0


def test_kept_until_the_last_reason_is_gone_and_given_back_once() -> None:
    inflight = InflightBytes(100, 100)
    reservation = inflight.reserve("a", 10, "request")
    assert reservation.keep_for("answer")
    for _ in range(2):
        reservation.done_with("request")
        assert inflight.bytes == 10
    for _ in range(2):
        reservation.done_with("answer")
        assert inflight.bytes == 0
    assert reservation.ended and not reservation.keep_for("late")


def test_an_answer_that_exists_already_is_counted_although_it_does_not_fit() -> None:
    inflight = InflightBytes(100, 50)
    reservation = inflight.reserve("a", 50, "request")
    reservation.grow(100, must_fit=False)
    assert inflight.bytes == 150
    reservation.shrink(50)
    assert inflight.bytes == 100
    reservation.done_with("request")
    assert inflight.bytes == 0


def test_whoever_waits_for_a_peer_is_called_once_when_it_gives_something_back() -> None:
    inflight = InflightBytes(100, 100)
    first, other = inflight.reserve("a", 10, "request"), inflight.reserve("b", 10, "request")
    told: list[int] = []
    inflight.when_given_back("a", lambda: told.append(inflight.bytes_of("a")))
    other.done_with("request")
    assert told == []
    first.shrink(4)
    first.done_with("request")
    assert told == [6]


def test_who_is_told_may_look_at_the_reservation() -> None:
    inflight = InflightBytes(100, 100)
    reservation = inflight.reserve("a", 10, "request")
    told: list[bool] = []
    inflight.when_given_back("a", lambda: told.append(reservation.keep_for("more")))
    reservation.done_with("request")
    assert told == [False]


def test_many_threads_leave_nothing() -> None:
    inflight = InflightBytes(10_000, 2_000)
    ending: list[threading.Thread] = []

    def work(peer: str) -> None:
        for i in range(300):
            try:
                reservation = inflight.reserve(peer, i, "request")
            except Overloaded:
                continue
            reservation.keep_for("task")
            ending.append(threading.Thread(target=reservation.done_with, args=("task",)))
            ending[-1].start()
            reservation.done_with("request")

    threads = [threading.Thread(target=work, args=(peer,)) for peer in ("a", "a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in ending:
        thread.join()
    assert inflight.bytes == 0 and not inflight._shares
    inflight.check()
