"""Who gets which row, and when to stop waiting: pure parts by hand, the waiting with scripted calls."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from moe.client.fan_out import Abandoned, Assignment, CutOff, Quorum, fan_out, name_rows
from moe.errors import CallTimeout, ConnectError
from moe.expert_uid import ExpertInfo
from moe.transport.memory import MemoryPeer


def infos(*uids):
    return [ExpertInfo(uid, MemoryPeer("p")) for uid in uids]


def rows_E(*rows):
    return [np.array(r, np.int64) for r in rows]


# --- Assignment ----------------------------------------------------------------------------------------------------


def test_assignment_groups_rows_by_expert():
    chosen = [infos("ffn.1.2", "ffn.0.7"), infos(), infos("ffn.0.7"), infos("ffn.3.3", "ffn.1.2", "ffn.0.7")]
    assignment = Assignment.of(chosen, "ffn.", 2)
    assert [expert.uid for expert in assignment.experts_E] == ["ffn.1.2", "ffn.0.7", "ffn.3.3"]
    assert [rows.tolist() for rows in assignment.rows_E] == [[0, 3], [0, 2, 3], [3]]
    assert assignment.slots_N.tolist() == [0, 1, 1, 0, 2, 0]
    assert assignment.coordinates_ND.tolist() == [[1, 2], [1, 2], [0, 7], [0, 7], [0, 7], [3, 3]]
    assert (assignment.batch_size, assignment.width) == (4, 3)


def test_assignment_keep_leaves_out_experts_without_rows():
    assignment = Assignment.of([infos("ffn.1", "ffn.0"), infos("ffn.0", "ffn.2")], "ffn.", 1)
    kept = assignment.keep(np.array([False, True, True, True]))
    assert [expert.uid for expert in kept.experts_E] == ["ffn.0", "ffn.2"]
    assert [rows.tolist() for rows in kept.rows_E] == [[0, 1], [1]] and kept.width == 2


@pytest.mark.parametrize("chosen", [[], [[], []]], ids=["no rows", "no experts"])
def test_assignment_of_nothing(chosen):
    assignment = Assignment.of(chosen, "ffn.", 2)
    assert assignment.experts_E == () and assignment.rows_E == [] and assignment.coordinates_ND.shape == (0, 2)
    assert assignment.keep(np.zeros(0, bool)).batch_size == len(chosen)


# --- Quorum --------------------------------------------------------------------------------------------------------


def test_quorum_is_reached_when_every_row_has_its_answers():
    quorum = Quorum(rows_E([0, 1], [1], [0]), np.array([1, 2]), zeros_allowed=False)
    assert not quorum.reached and not quorum.over
    quorum.count(0, True)
    assert not quorum.reached and quorum.short_rows().tolist() == [1]
    quorum.count(1, True)
    assert quorum.reached and not quorum.over and quorum.short_rows().tolist() == []
    quorum.count(2, False)
    assert quorum.reached and quorum.over and quorum.short_rows().tolist() == []


def test_quorum_is_over_when_a_row_cannot_be_served():
    quorum = Quorum(rows_E([0, 1], [1]), np.array([1, 1]), zeros_allowed=False)
    quorum.count(0, False)
    assert quorum.over and quorum.short_rows().tolist() == [0], "row 1 may still be answered"
    assert Quorum(rows_E([0]), np.array([1, 1]), zeros_allowed=False).over, "nobody was chosen for row 1"


def test_zeros_excuse_rows_without_any_answer_only():
    quorum = Quorum(rows_E([0], [0, 1]), np.array([2, 1]), zeros_allowed=True)
    quorum.count(1, False)
    assert quorum.reached is False and quorum.over is False
    quorum.count(0, False)
    assert quorum.over and quorum.short_rows().tolist() == []
    quorum = Quorum(rows_E([0], [0, 1]), np.array([2, 1]), zeros_allowed=True)
    quorum.count(0, True)
    quorum.count(1, False)
    assert quorum.over and quorum.short_rows().tolist() == [0]
    assert repr(quorum) == "Quorum(0 of 2 outstanding, 2 rows lack)"


# --- fan_out -------------------------------------------------------------------------------------------------------


class Script:
    """Calls that answer, fail or hang; which of them were cancelled."""

    def __init__(self):
        self.cancelled: list[str] = []

    async def answer(self, value):
        return value

    async def fail(self, error):
        raise error

    async def hang(self, name):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise


def run(make, quorum, **options):
    script = Script()

    async def main():
        results = await fan_out(make(script), quorum, **{"timeout_s": None, "after_quorum_s": None, **options})
        await asyncio.sleep(0)  # cancelled calls end
        return results

    return asyncio.run(main()), script.cancelled


def test_answers_and_failures_in_order():
    quorum = Quorum(rows_E([0], [0], [0]), np.array([1]), zeros_allowed=False)
    error = ConnectError("gone")
    results, cancelled = run(lambda s: [s.answer(1), s.fail(error), s.answer(3)], quorum)
    assert results == [1, error, 3] and cancelled == []


def test_time_is_over():
    quorum = Quorum(rows_E([0], [0]), np.array([2]), zeros_allowed=False)
    results, cancelled = run(lambda s: [s.hang("slow"), s.answer(2)], quorum, timeout_s=0.05)
    assert type(results[0]) is CallTimeout and "no answer within 0.05 s" in str(results[0])
    assert results[1] == 2 and cancelled == ["slow"]


def test_stragglers_after_the_quorum():
    quorum = Quorum(rows_E([0], [0]), np.array([1]), zeros_allowed=False)
    results, cancelled = run(lambda s: [s.hang("slow"), s.answer(2)], quorum, timeout_s=60, after_quorum_s=0.01)
    assert type(results[0]) is CutOff and results[1] == 2 and cancelled == ["slow"]


def test_waiting_that_is_pointless_ends_at_once():
    quorum = Quorum(rows_E([0], [0], [0]), np.array([2]), zeros_allowed=False)
    gone = ConnectError("gone")
    results, cancelled = run(lambda s: [s.hang("slow"), s.fail(gone), s.fail(gone)], quorum)
    assert type(results[0]) is Abandoned and cancelled == ["slow"]


def test_our_own_mistakes_are_not_taken_for_failing_experts():
    quorum = Quorum(rows_E([0], [0]), np.array([1]), zeros_allowed=False)
    with pytest.raises(ZeroDivisionError):
        run(lambda s: [s.hang("slow"), s.fail(ZeroDivisionError())], quorum)


def test_nothing_to_call():
    assert run(lambda s: [], Quorum([], np.zeros(2, np.int64), zeros_allowed=False)) == ([], [])


def test_cancelling_the_wait_cancels_the_calls():
    script = Script()

    async def main():
        quorum = Quorum(rows_E([0]), np.array([1]), zeros_allowed=False)
        waiting = asyncio.ensure_future(fan_out([script.hang("a")], quorum, timeout_s=60, after_quorum_s=None))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert script.cancelled == ["a"]


def test_name_rows():
    assert name_rows(np.arange(3)) == "[0, 1, 2]"
    assert name_rows(np.arange(25)).endswith("19] and 5 more")
