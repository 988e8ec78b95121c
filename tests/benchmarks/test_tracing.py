"""Stages are the times between points, of calls that passed all of them."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import tracing
from benchmarks.tracing import CLIENT_POINTS, SERVER_POINTS, STAGES, Point


class Worker:
    def work(self) -> int:
        return 1

    async def wait(self) -> int:
        return 2

    @staticmethod
    def think(value: int) -> int:
        return value


def test_wrapped_functions_note_their_times_and_do_what_they_did() -> None:
    stamps = tracing.install(
        [
            Point("begins", __name__, "Worker.work"),
            Point("waits", __name__, "Worker.wait", at_end=True),
            Point("thinks", __name__, "Worker.think"),
        ]
    )
    worker = Worker()
    assert (worker.work(), asyncio.run(worker.wait()), Worker.think(3)) == (1, 2, 3)
    begins, waits, thinks = (stamps[name] for name in ("begins", "waits", "thinks"))
    assert len(begins) == len(waits) == len(thinks) == 1
    assert begins[0] <= waits[0] <= thinks[0]


def test_stages_are_medians_of_the_times_between_points() -> None:
    names = {name for _, begin, end in STAGES for name in (begin, end)}
    order = [begin for _, begin, _ in STAGES] + [STAGES[-1][2]]
    stamps = {name: [order.index(name) * 0.001 + call for call in range(3)] for name in names}
    found = tracing.stages(stamps)
    assert list(found) == [name for name, _, _ in STAGES]
    assert all(ms == pytest.approx(1.0) for ms in found.values())


def test_points_that_were_not_passed_equally_often_are_refused() -> None:
    stamps = {name: [0.0] for _, begin, end in STAGES for name in (begin, end)}
    stamps["returned"] = []
    with pytest.raises(ValueError, match="equally often"):
        tracing.stages(stamps)


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_stages_lie_between_points_that_exist(operation: str) -> None:
    points = {point.name for point in (*CLIENT_POINTS[operation], *CLIENT_POINTS["both"], *SERVER_POINTS)}
    assert {name for _, begin, end in STAGES for name in (begin, end)} <= points


def test_of_a_forward_and_a_backward_the_backward_is_taken() -> None:
    stamps = {"called": [2.0, 4.0], "to be sent": [1.0, 2.5, 3.0, 4.5]}
    assert tracing.of_backwards(stamps) == {"called": [2.0, 4.0], "to be sent": [2.5, 4.5]}
