"""What the tests here share: servers in this process and in others, and a client that checks nothing before it sends."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing import forkserver
from typing import Any, TypeVar

import psutil
import torch

from moe.client.expert import transport_of
from moe.dht import DHT, PeerID, peers_line, resolve_p2p, start_dht
from moe.errors import ExpertNotFound, MoEError
from moe.server.expert_backend import ExpertBackend
from moe.server.server import Server
from moe.server.task_pool import Task, TaskPool
from moe.transport.auto import AutoTransport
from moe.transport.base import BACKWARD, FORWARD, Call, Reply
from moe.transport.event_loop import client_loop
from moe.transport.libp2p import LibP2PTransport
from moe.wire.hivemind_dialect import RPC_BACKWARD, RPC_FORWARD, STREAM_SUFFIX, ExpertResponse
from moe.wire.messages import RequestHeader, decode_reply_header

T = TypeVar("T")
ChildT = TypeVar("ChildT", bound="Child")

LOOPBACK: dict[str, Any] = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"]}
HANDLES = {FORWARD: RPC_FORWARD, BACKWARD: RPC_BACKWARD}
ANSWER_WITHIN_S = 5.0  # what is asked of bad input is 2 s; machines that run tests may be busy


def peers_of(dht: DHT) -> list[str]:
    """Addresses at which others can join."""
    return peers_line(dht).split()[1:]


def connect(dht: DHT) -> None:
    """Open the connection that all clients of a DHT share: now, not in the middle of a test that counts descriptors."""
    transport: Any = transport_of(dht)
    client_loop().run(transport.fallback._connected(), 30)


@contextlib.contextmanager
def serving(dht: DHT, *backends: ExpertBackend, **options: Any) -> Iterator[Server]:
    """A server in this process, in the swarm of ``dht``; it has a DHT process and a libp2p daemon of its own."""
    own_dht = start_dht(peers_of(dht), **LOOPBACK)
    server = Server(own_dht, {backend.name: backend for backend in backends}, **options)
    try:
        server.run_in_background()
        with contextlib.suppress(ExpertNotFound):  # for the threads of a direct link
            call = Call(FORWARD, "nobody", RequestHeader(), [], [])
            client_loop().run(transport_of(dht).call(own_dht.peer_id, call, timeout_s=30))
        yield server
    finally:
        server.shutdown()


class RawClient:
    """Sends a server whatever a test likes. All methods run in the client's event loop: see ``run``."""

    def __init__(self, dht: DHT, peer_id: Any):
        self.transport, self.peer_id = LibP2PTransport(resolve_p2p(dht)), peer_id
        self.direct = AutoTransport(self.transport, "unix")
        self.run(self.direct._connect(peer_id, 30))  # now, not in the middle of a test that counts descriptors

    def close(self) -> None:
        """Drop its connections."""
        self.run(self.direct.close())

    @staticmethod
    def run(coroutine: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Run something in the client's event loop and wait for it."""
        return client_loop().run(coroutine, timeout_s)

    @staticmethod
    def submit(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run something in the client's event loop."""
        return client_loop().submit(coroutine)

    async def call(
        self,
        method: str,
        uid: str,
        tensors: Sequence[torch.Tensor],
        header: RequestHeader | None = None,
        *,
        way: str = "unary",
        timeout_s: float = 30.0,
    ) -> Reply:
        """A well-formed call, of whatever contents.

        :param way: "unary", "stream" or "link"
        """
        header = RequestHeader() if header is None else header
        reply_bytes = 2**22 if way == "stream" else 0
        call = Call(method, uid, header, tensors, [0] * len(tensors), reply_bytes)
        transport = self.direct if way == "link" else self.transport
        return await transport.call(self.peer_id, call, timeout_s=timeout_s)

    async def send(self, method: str, request: Any, *, way: str = "unary") -> Any:
        """A request as it is; raises the error that the reply carries.

        :param request: an ExpertRequest, or bytes
        :param way: "unary" or "stream"
        """
        data = request if isinstance(request, bytes) else request.SerializeToString()
        if way == "stream":
            async with self.open_stream(method) as (reader, writer):
                writer.write(framed(data) + END_OF_STREAM)
                response = ExpertResponse.FromString(await read_message(reader))
        else:
            p2p = await self.transport._connected()
            answer = await p2p._client.control.call_unary_handler(self.peer_id, HANDLES[method], data)
            response = ExpertResponse.FromString(answer)
        return checked(response)

    @contextlib.asynccontextmanager
    async def open_stream(self, method: str) -> Any:
        """The two ends of a new stream to the server."""
        p2p = await self.transport._connected()
        _, reader, writer = await p2p.call_binary_stream_handler(self.peer_id, HANDLES[method] + STREAM_SUFFIX)
        try:
            yield reader, writer
        finally:
            writer.close()


END_OF_STREAM = b"\x01" + bytes(8)


def framed(data: bytes) -> bytes:
    """A message as it is written to a stream."""
    return b"\x00" + len(data).to_bytes(8, "big") + data


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """The next message of a stream."""
    head = await reader.readexactly(9)
    assert head[:1] == b"\x00", f"not a message: {head!r}"
    return await reader.readexactly(int.from_bytes(head[1:], "big"))


def checked(response: Any) -> Any:
    """A response, unless it carries an error."""
    header = decode_reply_header(response.metadata)
    if header is not None and header.error is not None:
        raise header.error.to_exception(peer=None, uid=None)
    return response


def report(text: str) -> None:
    """Something to read beside the result of a test, such as how long things took (pytest -rP shows it)."""
    sys.stdout.write(f"{text}\n")


class Answer:
    """What became of an attempt, and how long that took."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.elapsed_s = 0.0


@contextlib.contextmanager
def refused(
    kind: type[BaseException] | tuple[type[BaseException], ...], *texts: str, within_s: float = ANSWER_WITHIN_S
) -> Iterator[Answer]:
    """Like pytest.raises, but for exactly this class (or one of these), with these texts in the message, and in time."""
    answer, started = Answer(), time.monotonic()
    try:
        yield answer
    except Exception as e:
        answer.error = e
    answer.elapsed_s = time.monotonic() - started
    report(f"refused after {answer.elapsed_s * 1e3:.0f} ms: {answer.error!r:.300}")
    assert type(answer.error) in (kind if isinstance(kind, tuple) else (kind,)), f"got {answer.error!r:.1000}"
    message = answer.error.message if isinstance(answer.error, MoEError) else str(answer.error)
    for text in texts:
        assert text in message, f"{text!r} is not in {message!r}"
    assert answer.elapsed_s < within_s, f"refused only after {answer.elapsed_s:.2f} s"


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0, what: str = "it") -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)


async def gather_limited(make: Callable[[int], Awaitable[T]], count: int, at_once: int) -> list[T]:
    """Results of ``make(0)``, ``make(1)``, ..., with a bounded number of them at one time."""
    room = asyncio.Semaphore(at_once)

    async def one(i: int) -> T:
        async with room:
            return await make(i)

    return await asyncio.gather(*(one(i) for i in range(count)))


class Gate:
    """For ``Server(on_batch=...)``: holds the Runtime before its next batch, so that tasks gather behind it.

    :ivar batches: (pool, tasks) of each batch so far
    """

    def __init__(self) -> None:
        self.batches: list[tuple[str, int]] = []
        self._held, self._open = threading.Event(), threading.Event()
        self._open.set()

    def __call__(self, pool: TaskPool, batch: list[Task]) -> None:
        self.batches.append((pool.name, len(batch)))
        if not self._open.is_set():
            self._held.set()
            assert self._open.wait(60), "nobody has opened the gate"

    @contextlib.contextmanager
    def closed(self, blocker: Callable[[], object]) -> Iterator[None]:
        """Until the end of the body no batch is run.

        :param blocker: submits a task, of another pool: the one that is held
        """
        self._held.clear()
        self._open.clear()
        try:
            blocker()
            assert self._held.wait(30), "the Runtime took no batch"
            yield
        finally:
            self._open.set()


# --- other processes -----------------------------------------------------------------------------------------------

_starter = multiprocessing.get_context("forkserver")  # a process that has imported all there is to import, and forks
_starter.set_forkserver_preload(["tests.swarm.host"])


def prepare_processes() -> None:
    """Let the process that starts others begin with its imports."""
    forkserver.ensure_running()


class Child:
    """A function in a new process. At the end, that process and all that it has started are killed.

    :param target: a function on module level; its first argument is a pipe to here
    :param args: further arguments
    """

    def __init__(self, target: Callable[..., object], *args: Any):
        self._pipe, theirs = _starter.Pipe()
        self._process = _starter.Process(target=target, args=(theirs, *args))
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.process = psutil.Process(self._process.pid)
        self._family: list[psutil.Process] = []

    def __enter__(self: ChildT) -> ChildT:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._process.join(10)
        self._process.close()
        self._pipe.close()
        self.survivors()

    def receive(self, timeout_s: float = 60.0) -> Any:
        """The next thing it sends; fails if it ends instead."""
        assert self._pipe.poll(timeout_s), f"the process said nothing for {timeout_s} s"
        return self._pipe.recv()

    def send(self, message: Any) -> None:
        """Tell it something."""
        self._pipe.send(message)

    def family(self) -> list[psutil.Process]:
        """All processes it has started so far, and those that these have."""
        with contextlib.suppress(psutil.NoSuchProcess):
            known = {process.pid for process in self._family}
            self._family += [child for child in self.process.children(recursive=True) if child.pid not in known]
        return self._family

    def kill(self, *, alone: bool = False) -> None:
        """SIGKILL it and its family, or only it."""
        for process in [*([] if alone else self.family()), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def terminate(self) -> None:
        """SIGTERM."""
        self.family()
        self._process.terminate()

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None if it still runs."""
        self._process.join(timeout_s)
        return self._process.exitcode

    def survivors(self, timeout_s: float = 3.0) -> list[psutil.Process]:
        """Those of its family that still run some time after its end. (The dead that init has not reaped do not.)"""
        deadline = time.monotonic() + timeout_s
        while left := [process for process in self._family if _runs(process)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return left

    def rss_bytes(self) -> int:
        """Memory of all its processes together."""
        return sum(process.memory_info().rss for process in [self.process, *self.family()])

    def descriptors(self) -> int:
        """Open descriptors of all its processes together."""
        return sum(process.num_fds() for process in [self.process, *self.family()])


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Host(Child):
    """A server in a process of its own.

    :param peers: of the swarm to join
    :param spec: see tests/swarm/host.py
    """

    def __init__(self, peers: Sequence[str] = (), **spec: Any):
        from tests.swarm.host import serve

        super().__init__(serve, {"peers": list(peers), **spec})
        try:
            ready = self.receive()
        except BaseException:
            self.__exit__()
            raise
        self.peers: list[str] = ready["peers"]
        self.peer_id = PeerID.from_base58(self.peers[0].rsplit("/", 1)[1])
        self.start_s: float = ready["start_s"]
        self.family()
