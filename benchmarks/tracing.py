"""When a call passes which point of the code, on both sides. Owns: the points, and turning their times into stages.

Functions of this project are wrapped so that they note the time at which they are entered or left; the clock is that of the
machine, the same in all its processes. Only for calls made one after another, so that the n-th stamp of a point belongs to the
n-th call. Must not know: processes, or what the stages are shown for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Point(NamedTuple):
    """A place in the code, and its name.

    :ivar module: where the class is
    :ivar method: ``Class.method``
    :ivar at_end: when it is left, not entered
    """

    name: str
    module: str
    method: str
    at_end: bool = False


LINK = "moe.transport.direct"
CLIENT_POINTS = {
    "forward": (
        Point("called", "moe.client.expert", "RemoteExpert.call_within"),
        Point("checked", "moe.client.requests", "Request.forward_call"),
        Point("returned", "moe.client.expert", "RemoteExpert.call_within", at_end=True),
    ),
    "backward": (
        Point("called", "moe.client.expert", "_RemoteExpertCall.backward"),
        Point("checked", "moe.client.requests", "Request.backward_call"),
        Point("returned", "moe.client.expert", "_RemoteExpertCall.backward", at_end=True),
    ),
    "both": (
        Point("to be sent", "moe.transport.link", "Link.send"),
        Point("reply begins", LINK, "DirectClient.opened"),
        Point("reply is there", LINK, "DirectClient.completed"),
    ),
}
SERVER_POINTS = (
    Point("request begins", LINK, "_ServerLink.opened"),
    Point("request is there", LINK, "_ServerLink.completed"),
    Point("waits", "moe.server.task_pool", "TaskPool.submit"),
    Point("computed from", "moe.server.task_pool", "TaskPool.process"),
    Point("computed until", "moe.server.task_pool", "TaskPool._resolve"),
    Point("answer to be sent", "moe.transport.link", "Link.send"),
)
STAGES = (  # what happens between two points; in the order of time
    ("client: bind, check against the schema", "called", "checked"),
    ("client: header, encode", "checked", "to be sent"),
    ("wire: request begins to arrive", "to be sent", "request begins"),
    ("wire: rest of the request", "request begins", "request is there"),
    ("server: decode, check against the schema", "request is there", "waits"),
    ("server: queue, to the Runtime thread", "waits", "computed from"),
    ("server: compute", "computed from", "computed until"),
    ("server: header, encode", "computed until", "answer to be sent"),
    ("wire: reply begins to arrive", "answer to be sent", "reply begins"),
    ("wire: rest of the reply", "reply begins", "reply is there"),
    ("client: to the caller's thread, decode, check", "reply is there", "returned"),
)

Stamps = dict[str, list[float]]


def install(points: Sequence[Point]) -> Stamps:
    """Wrap the functions, for the life of this process.

    :returns: where their times will be, by name of the point
    """
    stamps: Stamps = {point.name: [] for point in points}
    for point in points:
        cls_name, _, method = point.method.partition(".")
        cls = getattr(importlib.import_module(point.module), cls_name)
        found = inspect.getattr_static(cls, method)
        function = found.__func__ if isinstance(found, staticmethod) else found
        wrapped = _stamping(function, stamps[point.name], point.at_end)
        setattr(cls, method, staticmethod(wrapped) if isinstance(found, staticmethod) else wrapped)
    return stamps


def _stamping(function: Callable[..., Any], times: list[float], at_end: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not at_end:
            times.append(time.monotonic())
        try:
            return function(*args, **kwargs)
        finally:
            if at_end:
                times.append(time.monotonic())

    @functools.wraps(function)
    async def call_async(*args: Any, **kwargs: Any) -> Any:
        if not at_end:
            times.append(time.monotonic())
        try:
            return await function(*args, **kwargs)
        finally:
            if at_end:
                times.append(time.monotonic())

    return call_async if inspect.iscoroutinefunction(function) else call


def of_backwards(stamps: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The stamps of backwards alone: a forward went before each of them, past the points that both have in common."""
    backwards = len(stamps["called"])
    return {name: times[1::2] if len(times) == 2 * backwards else times for name, times in stamps.items()}


def stages(stamps: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median milliseconds of each stage, over all calls.

    :param stamps: of both sides, the same number at every point
    :raises ValueError: the points were not passed the same number of times
    """
    counts = {name: len(times) for name, times in stamps.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the points were not passed equally often: {counts}")
    return {
        name: 1e3 * statistics.median(b - a for a, b in zip(stamps[begin], stamps[end])) for name, begin, end in STAGES
    }
