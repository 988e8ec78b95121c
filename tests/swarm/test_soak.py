"""What must not grow: memory and descriptors over thousands of failures, anything at all over fifty servers."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import psutil
import pytest
import torch

from moe.client.expert import RemoteExpert
from moe.config import ClientConfig
from moe.dht import DHT, start_dht
from moe.errors import MoEError
from moe.expert_uid import ExpertInfo
from moe.server.server import Server
from moe.transport.base import BACKWARD, FORWARD
from moe.wire.hivemind_dialect import ExpertRequest, to_message
from moe.wire.messages import RequestHeader
from moe.wire.tensors import encode_tensor
from tests.leaks import Snapshot, find_leaks
from tests.swarm.experts import WIDTH, Scripted, make_backend
from tests.swarm.tools import LOOPBACK, Host, RawClient, gather_limited, peers_of, report

MIB = 2**20
FAILING_CALLS = 10_000
CYCLES = 50


def failing_calls(raw: RawClient) -> list[Callable[[], Awaitable[object]]]:
    """Ways to fail, on either side, by either transport."""
    good, wrong = torch.ones(2, WIDTH), torch.ones(2, WIDTH + 1)
    bad = torch.full((2, WIDTH), Scripted.RAISE)
    late = RequestHeader(time_left_s=0.0)
    garbage = ExpertRequest(uid="scripted.0", tensors=[to_message(encode_tensor(good))], metadata=b"\xc1")

    def call(method: str, *tensors: torch.Tensor, uid: str = "scripted.0", **options: object) -> Awaitable[object]:
        return raw.call(method, uid, tensors, **options)  # type: ignore[arg-type]

    return [
        lambda: call(FORWARD, wrong),
        lambda: call(BACKWARD, good, wrong),
        lambda: call(FORWARD, good, uid="nobody.0"),
        lambda: call(FORWARD, bad),
        lambda: call(BACKWARD, bad, good),
        lambda: call(FORWARD, good, header=late),
        lambda: call(FORWARD, good, uid="slow.0", timeout_s=1e-4),  # gives up
        lambda: call(FORWARD, wrong, way="stream"),
        lambda: call(FORWARD, bad, way="stream"),
        lambda: raw.send(FORWARD, garbage),
        lambda: call(FORWARD, wrong, way="link"),
        lambda: call(BACKWARD, bad, good, way="link"),
        lambda: call(FORWARD, good, uid="nobody.0", way="link"),
    ]


@pytest.mark.timeout(300)
def test_ten_thousand_failing_calls(dht: DHT) -> None:
    experts = [{"kind": "scripted", "uid": "scripted.0", "lr": 0.0}, {"kind": "slow", "uid": "slow.0"}]
    with Host(peers_of(dht), experts=experts) as host:
        raw = RawClient(dht, host.peer_id)
        ways = failing_calls(raw)
        failures: Counter[str] = Counter()

        async def fail(number: int) -> None:
            try:
                await ways[number % len(ways)]()
            except MoEError as e:
                failures[type(e).__name__] += 1
            else:
                raise AssertionError(f"call {number % len(ways)} did not fail")

        def measure() -> tuple[int, int, int, int]:
            gc.collect()
            own = psutil.Process()
            return host.rss_bytes(), host.descriptors(), own.memory_info().rss, own.num_fds()

        raw.run(gather_limited(fail, FAILING_CALLS // 8, 50), 120)  # whatever is filled once
        before, begin = measure(), time.monotonic()
        raw.run(gather_limited(fail, FAILING_CALLS, 50), 240)
        elapsed_s, after = time.monotonic() - begin, measure()
        report(f"{FAILING_CALLS} calls in {elapsed_s:.1f} s: {dict(failures)}")
        report(f"server {before[0] / MIB:.0f} -> {after[0] / MIB:.0f} MiB, {before[1]} -> {after[1]} descriptors")
        report(f"client {before[2] / MIB:.0f} -> {after[2] / MIB:.0f} MiB, {before[3]} -> {after[3]} descriptors")
        assert after[0] - before[0] < 48 * MIB
        assert after[2] - before[2] < 48 * MIB
        assert after[1] <= before[1] + 5
        assert after[3] <= before[3] + 5
        reply = raw.run(raw.call(FORWARD, "scripted.0", [torch.ones(2, WIDTH)]))
        torch.testing.assert_close(reply.tensors[0], torch.full((2, WIDTH), 2.0))
        raw.close()


@pytest.mark.timeout(300)
def test_fifty_servers_one_after_the_other(dht: DHT) -> None:
    """Start, call, stop, in one process: no hang, and no child, thread or descriptor is left of any of them."""

    def cycle(number: int) -> float:
        begin = time.monotonic()
        backend = make_backend("linear", "linear.0", lr=0.1)
        server = Server(start_dht(peers_of(dht), **LOOPBACK), {"linear.0": backend}, start=True)
        try:
            transport = "auto" if number % 2 else "libp2p"
            config = ClientConfig(transport=transport)
            expert = RemoteExpert(ExpertInfo("linear.0", server.dht.peer_id), dht, config=config)
            x = torch.ones(2, WIDTH)
            y = expert(x)
            torch.testing.assert_close(y, backend.module(x))
            y.sum().backward()
            assert backend.updates == 1
        finally:
            server.shutdown()
        return time.monotonic() - begin

    cycle(0)
    gc.collect()
    before = Snapshot.take()
    durations = [cycle(number) for number in range(CYCLES)]
    report(f"{sum(durations):.1f} s for {CYCLES} cycles, the longest {max(durations):.1f} s")
    assert find_leaks(before) == []
