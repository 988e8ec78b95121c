"""OnceWindow: a request id never trains twice, within bounded memory; time is a number."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe.server.once
from moe.errors import Refused
from moe.server.once import OnceWindow


def window(max_replies: int = 3, max_bytes: int = 100, window_s: float = 10.0) -> OnceWindow[str]:
    return OnceWindow(max_replies, max_bytes, window_s)


def test_a_repeat_finds_the_first_request_while_it_runs_and_when_it_is_done() -> None:
    once = window()
    assert once.find("id", 0.0) is None
    once.begin("id", "request")
    assert once.find("id", 1.0) == "request"
    once.finish("id", 10, 2.0)
    assert once.find("id", 3.0) == "request"
    assert repr(once) == "OnceWindow(0 running, 1 answers of 10 bytes)"


def test_a_request_that_failed_may_be_tried_again() -> None:
    once = window()
    once.begin("id", "first")
    once.abandon("id")
    assert once.find("id", 0.0) is None
    once.begin("id", "second")
    once.finish("id", 1, 0.0)
    assert once.find("id", 0.0) == "second"
    once.abandon("never begun")
    once.finish("never begun", 1, 0.0)
    assert once.find("never begun", 0.0) is None


def test_after_the_window_a_request_is_forgotten() -> None:
    once = window()
    once.begin("id", "request")
    assert once.find("id", 1000.0) == "request"  # as long as it runs it is known
    once.finish("id", 10, 1000.0)
    assert once.find("id", 1009.9) == "request"
    assert once.find("id", 1010.0) is None
    assert repr(once) == "OnceWindow(0 running, 0 answers of 0 bytes)"


@pytest.mark.parametrize("bounds", [{"max_replies": 2}, {"max_bytes": 25}])
def test_a_dropped_answer_is_refused_not_trained_again(bounds: dict[str, int]) -> None:
    once = window(**bounds)
    for i in range(4):
        once.begin(i, f"request {i}")
        once.finish(i, 10, float(i))
    for i in (0, 1):
        with pytest.raises(Refused, match="not trained twice"):
            once.find(i, 4.0)
    assert [once.find(i, 4.0) for i in (2, 3)] == ["request 2", "request 3"]
    assert once.find(0, 10.0) is None  # the window is over for it


def test_an_answer_too_large_to_keep_is_still_never_trained_twice() -> None:
    once = window(max_bytes=5)
    once.begin("id", "large")
    once.finish("id", 6, 0.0)
    with pytest.raises(Refused):
        once.find("id", 0.0)


def test_ids_without_answers_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe.server.once, "MAX_REMEMBERED_IDS", 50)
    once = window(max_replies=1)
    for i in range(1000):
        once.begin(i, "request")
        once.finish(i, 1, 0.0)
    assert sum(len(value) for value in vars(once).values() if hasattr(value, "__len__")) <= 52


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ask", "finish", "abandon", "wait"]), st.integers(0, 4)), max_size=60))
def test_within_the_window_no_id_is_ever_trained_twice(steps: list[tuple[str, int]]) -> None:
    once, now = window(max_replies=2, max_bytes=30, window_s=5.0), 0.0
    running: set[int] = set()
    trained: dict[int, float] = {}
    for step, key in steps:
        if step == "wait":
            now += 1.0
        elif step == "ask":
            try:
                first = once.find(key, now)
            except Refused:
                assert now < trained[key] + 5.0
                continue
            if first is None:
                assert key not in running
                assert key not in trained or now >= trained[key] + 5.0
                once.begin(key, str(key))
                running.add(key)
            else:
                assert first == str(key)
        elif key in running:
            running.discard(key)
            if step == "finish":
                trained[key] = now
                once.finish(key, 10 + key, now)
            else:
                once.abandon(key)
