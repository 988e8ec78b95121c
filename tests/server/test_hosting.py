"""Experts that come and go while a server runs: under load, with requests in every state, and leaving nothing behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.client.expert import RemoteExpert
from moe.config import ClientConfig, HandlerConfig, ServerConfig
from moe.errors import CallTimeout, ConfigError, ExpertNotFound, LifecycleError, TransportError
from moe.expert_uid import ExpertInfo
from moe.schema import Compression
from moe.server.checkpoints import CheckpointSaver, find_checkpointed_uids
from moe.server.connection_handler import Traffic
from moe.server.hosting import Hosting, QuietWatch
from moe.testing import MemoryServer, MemorySwarm
from moe.transport.base import FORWARD
from moe.transport.event_loop import client_loop
from moe.wire.messages import RequestHeader
from tests.experts import HIDDEN, linear_backend

WAIT_S = 20.0  # generous: the machine may be busy
SOON = ServerConfig(drain_quiet_s=0.0, drain_timeout_s=WAIT_S, start_timeout_s=WAIT_S)


class FakeAnnouncer:
    """Shows what it is told to, after ``looks`` looks. Before each change it calls ``check``."""

    def __init__(self, looks: int = 0):
        self.uids: list[str] = []
        self.looks = looks
        self.errors: list[Exception] = []
        self.check: Callable[[str, list[str]], None] = lambda change, uids: None

    def add(self, uids: Iterable[str]) -> None:
        self.check("add", list(uids))
        self.uids += uids
        if self.errors:
            raise self.errors.pop()

    def remove(self, uids: Iterable[str]) -> None:
        self.check("remove", list(uids))
        self.uids = [uid for uid in self.uids if uid not in set(uids)]
        if self.errors:
            raise self.errors.pop()

    def are_visible(self, uids: Iterable[str]) -> bool:
        self.looks -= 1
        return self.looks < 0 and set(uids) <= set(self.uids)


@pytest.fixture
def server() -> Iterator[MemoryServer]:
    with MemoryServer({"stay.0": linear_backend("stay.0")}) as server:
        yield server


def hosting_of(server: MemoryServer, announcer: Any = None, config: ServerConfig = SOON, **options: Any) -> Hosting:
    hosting = Hosting(server.backends, server.runtime, server.handler, config=config, **options)
    hosting.loop, hosting.announcer = client_loop(), announcer
    return hosting


def client(server: MemoryServer, uid: str) -> RemoteExpert:
    swarm = MemorySwarm([server])
    return RemoteExpert(ExpertInfo(uid, server.peer), swarm.transport, config=ClientConfig(total_timeout_s=WAIT_S))


def x(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, HIDDEN)


def traffic_of(server: MemoryServer, uid: str) -> Traffic:
    async def read() -> Traffic:
        return server.handler.traffic([uid])

    return client_loop().run(read(), WAIT_S)


def eventually(condition: Callable[[], object]) -> None:
    done = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if condition():
            return
        done.wait(0.005)
    raise AssertionError("did not come true")


# --- when an expert may go --------------------------------------------------------------------------------------------


def test_quiet_is_when_nothing_is_open_and_nothing_has_come_for_a_while() -> None:
    watch = QuietWatch(5.0, Traffic(10, 0), now=100.0)
    assert not watch.is_quiet(Traffic(10, 0), 104.9)
    assert watch.is_quiet(Traffic(10, 0), 105.0)
    assert not watch.is_quiet(Traffic(11, 1), 106.0)  # one has come
    assert not watch.is_quiet(Traffic(11, 1), 200.0)  # and is still open
    assert not watch.is_quiet(Traffic(11, 0), 201.0)
    assert not watch.is_quiet(Traffic(12, 0), 204.0)  # another came and went between two looks
    assert not watch.is_quiet(Traffic(12, 0), 208.9)
    assert watch.is_quiet(Traffic(12, 0), 209.0)


def test_quiet_without_a_pause_is_when_nothing_is_open() -> None:
    watch = QuietWatch(0.0, Traffic(3, 1), now=100.0)
    assert not watch.is_quiet(Traffic(3, 1), 101.0)
    assert watch.is_quiet(Traffic(3, 0), 101.0)


# --- coming and going -------------------------------------------------------------------------------------------------


def test_an_expert_is_announced_when_it_can_be_called_and_hidden_before_it_cannot(server: MemoryServer) -> None:
    announcer = FakeAnnouncer(looks=3)
    hosting = hosting_of(server, announcer)
    seen = []

    def check(change: str, uids: list[str]) -> None:
        seen.append((change, uids))
        client(server, "come.0")(x())

    announcer.check = check
    backend = linear_backend("come.0")
    hosting.add({"come.0": backend})
    assert announcer.looks < 0  # it was looked for until it was there
    assert list(hosting.backends) == ["stay.0", "come.0"]
    data = x()
    torch.testing.assert_close(client(server, "come.0")(data), backend.module(data))
    hosting.remove(["come.0"])
    assert seen == [("add", ["come.0"]), ("remove", ["come.0"])]
    assert list(hosting.backends) == ["stay.0"]
    with pytest.raises(ExpertNotFound):
        client(server, "come.0")(x())
    client(server, "stay.0")(x())


def test_under_load_no_request_is_lost(server: MemoryServer) -> None:
    """Callers in threads, forward and backward, while two experts come and go: every call ends, with its own result or, for
    those that have gone, with ExpertNotFound; every backward that was answered was trained, once."""
    hosting, ending = hosting_of(server, FakeAnnouncer()), threading.Event()
    trained = {f"come.{i}": 0 for i in range(2)}
    counting = threading.Lock()

    def call(uid: str) -> tuple[int, int]:
        answered = missing = 0
        expert = client(server, uid)
        while not ending.is_set():
            data = x().requires_grad_()
            try:
                y = expert(data)
                if uid == "stay.0":
                    torch.testing.assert_close(y, server.backends[uid].module(data))
                else:
                    y.sum().backward()
                    with counting:
                        trained[uid] += 1
                answered += 1
            except ExpertNotFound:
                missing += 1
                expert.caller.forget_description()
        return answered, missing

    served = dict.fromkeys(trained, 0)
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(call, uid) for uid in ("stay.0", "stay.0", *trained, *trained)]
        try:
            for _ in range(12):
                backends = {uid: linear_backend(uid, lr=0.1) for uid in trained}
                hosting.add(backends)
                eventually(lambda backends=backends: all(backend.updates >= 3 for backend in backends.values()))  # type: ignore[misc]
                hosting.remove(list(trained))
                for uid, backend in backends.items():
                    served[uid] += backend.backward_pool.statistics().tasks
        finally:
            ending.set()
        results = [call.result(WAIT_S) for call in calls]
    assert all(answered > 0 for answered, _ in results)
    assert all(missing == 0 for _, missing in results[:2])
    assert all(missing > 0 for _, missing in results[2:])
    assert trained == served
    assert len(server.runtime.pools) == 2 + 1  # of the expert that stayed, and the test kit's own


def test_a_request_in_the_queue_is_answered_before_its_expert_goes(server: MemoryServer) -> None:
    hosting = hosting_of(server)
    hosting.add({"come.0": linear_backend("come.0")})
    expert = client(server, "come.0")
    expert(x())  # it knows now what it takes
    with ThreadPoolExecutor(2) as threads:
        with server.paused():
            answer = threads.submit(expert, x())
            server.wait_pending(1)
            removal = threads.submit(hosting.remove, ["come.0"], timeout_s=0.0)
            eventually(lambda: "come.0" not in server.handler.backends)
            with pytest.raises(ExpertNotFound):
                client(server, "come.0")(x())
            assert not removal.done()
            assert not answer.done()
        assert answer.result(WAIT_S).shape == (2, HIDDEN)
        removal.result(WAIT_S)
    assert traffic_of(server, "come.0").open == 0


def test_a_request_that_is_still_being_received_is_served(server: MemoryServer) -> None:
    hosting = hosting_of(server)
    hosting.add({"come.0": linear_backend("come.0")})

    async def open_request() -> Any:
        admission = server.handler.open("peer", FORWARD, "come.0", RequestHeader())
        admission.admit(0, (2, HIDDEN), "float32", Compression.NONE)
        return admission

    async def finish_request() -> Any:
        try:
            return await admission.run([x()])
        finally:
            admission.release()
            admission.release()  # a second one changes nothing

    admission = client_loop().run(open_request(), WAIT_S)
    with ThreadPoolExecutor(1) as threads:
        removal = threads.submit(hosting.remove, ["come.0"], timeout_s=0.0)
        eventually(lambda: "come.0" not in server.handler.backends)
        assert not removal.done()
        assert list(hosting.backends) == ["stay.0", "come.0"]
        assert client_loop().run(finish_request(), WAIT_S).tensors[0].shape == (2, HIDDEN)
        removal.result(WAIT_S)
    assert traffic_of(server, "come.0") == Traffic(traffic_of(server, "come.0").opened, 0)


def test_experts_that_are_called_all_the_time_go_when_the_time_is_over(server: MemoryServer) -> None:
    hosting = hosting_of(server, config=ServerConfig(drain_quiet_s=60.0, drain_timeout_s=0.3))
    hosting.add({"come.0": linear_backend("come.0")})
    hosting.remove(["come.0"])
    assert list(hosting.backends) == ["stay.0"]


def test_what_has_gone_is_no_longer_in_memory(server: MemoryServer) -> None:
    hosting = hosting_of(server)
    threads, pools = threading.active_count(), server.runtime.pools
    backend = linear_backend("come.0", lr=0.1)
    gone = [weakref.ref(backend), weakref.ref(backend.module), *map(weakref.ref, backend.get_pools())]
    hosting.add({"come.0": backend})
    data = x().requires_grad_()
    client(server, "come.0")(data).sum().backward()
    del backend
    hosting.remove(["come.0"])

    gc.collect()
    assert [one for one in gone if one() is not None] == []
    assert server.runtime.pools == pools
    assert threading.active_count() == threads


def test_an_expert_may_come_back(server: MemoryServer) -> None:
    hosting = hosting_of(server)
    for _ in range(3):
        backend = linear_backend("come.0")
        hosting.add({"come.0": backend})
        client(server, "come.0")(x())
        hosting.remove(["come.0"])


def test_a_server_may_begin_and_end_without_any_expert() -> None:
    with MemoryServer({}) as server:
        hosting = hosting_of(server)
        hosting.add({"come.0": linear_backend("come.0")})
        client(server, "come.0")(x())
        hosting.remove(["come.0"])
        assert hosting.backends == {}


# --- when something goes wrong ----------------------------------------------------------------------------------------


def test_experts_that_cannot_be_announced_are_not_hosted(server: MemoryServer) -> None:
    announcer = FakeAnnouncer()
    announcer.errors = [TransportError("the DHT is away")]
    hosting = hosting_of(server, announcer)
    with pytest.raises(TransportError, match="the DHT is away"):
        hosting.add({"come.0": linear_backend("come.0")})
    assert list(hosting.backends) == ["stay.0"]
    assert announcer.uids == []
    with pytest.raises(ExpertNotFound):
        client(server, "come.0")(x())
    hosting.add({"come.0": linear_backend("come.0")})  # another time


def test_experts_that_nobody_can_find_are_not_hosted(server: MemoryServer) -> None:
    announcer = FakeAnnouncer(looks=10**6)
    hosting = hosting_of(server, announcer)
    with pytest.raises(CallTimeout, match="could not be found"):
        hosting.add({"come.0": linear_backend("come.0")}, timeout_s=0.3)
    assert list(hosting.backends) == ["stay.0"]
    assert announcer.uids == []


def test_experts_that_cannot_be_hidden_go_all_the_same(server: MemoryServer, caplog: pytest.LogCaptureFixture) -> None:
    announcer = FakeAnnouncer()
    hosting = hosting_of(server, announcer)
    hosting.add({"come.0": linear_backend("come.0")})
    announcer.errors = [CallTimeout("slow")]
    hosting.remove(["come.0"])
    assert "could not retract 1 experts" in caplog.text
    assert list(hosting.backends) == ["stay.0"]


def test_mistakes(server: MemoryServer) -> None:
    hosting = hosting_of(server)
    with pytest.raises(ConfigError, match=r"hosts stay\.0 already"):
        hosting.add({"stay.0": linear_backend("stay.0")})
    with pytest.raises(ConfigError, match=r"given as 'a\.0' is named 'b\.0'"):
        hosting.add({"a.0": linear_backend("b.0")})
    with pytest.raises(ConfigError, match=r"does not host gone\.0"):
        hosting.remove(["stay.0", "gone.0"])
    client(server, "stay.0")(x())
    hosting.loop = None
    for change in (lambda: hosting.add({"a.0": linear_backend("a.0")}), lambda: hosting.remove(["stay.0"])):
        with pytest.raises(LifecycleError, match="only while the server runs"):
            change()


def test_an_expert_leaves_once(server: MemoryServer) -> None:
    hosting = hosting_of(server, config=ServerConfig(drain_quiet_s=60.0))
    hosting.add({"come.0": linear_backend("come.0")})
    with ThreadPoolExecutor(1) as threads:
        removal = threads.submit(hosting.remove, ["come.0"])
        eventually(lambda: "1 of them leaving" in repr(hosting))
        with pytest.raises(ConfigError, match="or not for long"):
            hosting.remove(["come.0"])
        with pytest.raises(ConfigError, match="already"):
            hosting.add({"come.0": linear_backend("come.0")})
        hosting.stopping.set()  # a server that stops waits for nobody
        removal.result(WAIT_S)
    assert list(hosting.backends) == ["stay.0"]


def test_a_runtime_that_has_ended_takes_no_more(server: MemoryServer) -> None:
    hosting = hosting_of(server)
    server.runtime.shutdown()
    with pytest.raises(LifecycleError, match="stopping"):
        hosting.add({"come.0": linear_backend("come.0")})
    assert list(hosting.backends) == ["stay.0"]


def test_requests_that_hang_do_not_keep_an_expert_for_ever(server: MemoryServer) -> None:
    server.handler.config = HandlerConfig(request_timeout_s=0.2)
    hosting = hosting_of(server)
    hosting.add({"come.0": linear_backend("come.0")})

    async def open_request() -> Any:
        return server.handler.open("peer", FORWARD, "come.0", RequestHeader())

    admission = client_loop().run(open_request(), WAIT_S)  # and its tensors never come
    hosting.remove(["come.0"], timeout_s=0.0)
    assert list(hosting.backends) == ["stay.0"]

    async def release() -> None:
        admission.release()

    client_loop().run(release(), WAIT_S)


def test_what_experts_have_learned_is_saved_when_they_go(server: MemoryServer, tmp_path: Path) -> None:
    saver = CheckpointSaver(server.backends, tmp_path)
    hosting = hosting_of(server, saver=saver)
    hosting.add({"come.0": linear_backend("come.0", lr=0.1)})
    assert list(saver.experts) == ["stay.0", "come.0"]
    hosting.remove(["come.0"])
    assert list(saver.experts) == ["stay.0"]
    assert find_checkpointed_uids(tmp_path) == ["come.0"]
