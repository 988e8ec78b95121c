"""The direct link over real sockets in this process: exact, multiplexed, and unharmed by strangers, stalls and garbage."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from moe.config import HandlerConfig
from moe.errors import (
    CallTimeout,
    ConnectError,
    ExpertFailed,
    ExpertNotFound,
    MoEError,
    PeerGone,
    RemoteSchemaError,
)
from moe.schema import BatchTensorProto, Compression
from moe.server.connection_handler import ConnectionHandler
from moe.server.expert_backend import ExpertBackend
from moe.server.runtime import Runtime
from moe.transport.auto import AutoTransport
from moe.transport.base import BACKWARD, FORWARD, Call, Reply
from moe.transport.direct import DirectClient, DirectServer, dial
from moe.transport.event_loop import EventLoopThread
from moe.transport.memory import MemoryPeer
from moe.transport.tickets import Ticket
from moe.wire.frames import DATA, HEADER, HELLO, OPEN, encode_frame
from moe.wire.messages import ExpertDescription, RequestHeader, new_request_id
from tests.experts import HIDDEN, LORA_KWARGS, LoraExpert, in_parallel, lora_backend

KINDS = ("unix", "tls")


class SlowExpert(torch.nn.Module):
    """Waits for a gate, which a test opens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.delay_s = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay_s)
        return x * 2 + self.weight


class Host:
    """A server with direct links only, and a loop for clients."""

    def __init__(self, backends: dict[str, ExpertBackend], config: HandlerConfig | None = None):
        self.backends = backends
        self.runtime = Runtime(backends)
        self.handler = ConnectionHandler(backends, config)
        self.server_loop, self.client_loop = EventLoopThread("moe-test-server"), EventLoopThread("moe-test-client")
        self.direct = DirectServer(self.handler, hosts=["127.0.0.1"], listen_host="127.0.0.1")

    def __enter__(self) -> Host:
        self.runtime.start()
        self.server_loop.run(self.direct.start(), 10.0)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server_loop.run(self.direct.stop(), 10.0)
        self.runtime.shutdown()
        self.client_loop.stop()
        self.server_loop.stop()

    def ticket(self, peer: str = "client") -> Ticket:
        async def issue() -> Ticket:
            return self.direct.ticket(peer)

        return self.server_loop.run(issue(), 5.0)

    def run(self, work: Callable[[DirectClient], Coroutine[Any, Any, Any]], kind: str) -> Any:
        """Run work with an open link."""

        async def with_link() -> Any:
            sock = await asyncio.get_running_loop().run_in_executor(None, dial, self.ticket(), kind)
            client = DirectClient(sock, "server", lambda _: None)
            try:
                return await work(client)
            finally:
                client.close()

        return self.client_loop.run(with_link(), 60.0)

    @contextlib.contextmanager
    def link(self, kind: str) -> Iterator[DirectClient]:
        """An open link, for threads."""

        async def connect() -> DirectClient:
            sock = await asyncio.get_running_loop().run_in_executor(None, dial, self.ticket(), kind)
            return DirectClient(sock, "server", lambda _: None)

        async def close(client: DirectClient) -> None:
            client.close()

        client = self.client_loop.run(connect(), 10.0)
        try:
            yield client
        finally:
            if self.client_loop.is_alive():
                self.client_loop.run(close(client), 10.0)

    def await_release(self) -> None:
        """Soon after the last reply, nothing is in flight."""
        deadline = time.monotonic() + 10.0
        while self.handler.inflight.bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.handler.inflight.bytes == 0

    def links(self) -> int:
        async def count() -> int:
            await asyncio.sleep(0.05)
            return self.direct.links

        return self.server_loop.run(count(), 5.0)


def forward_call(x: torch.Tensor, uid: str = "lora.0", **header: Any) -> Call:
    return Call(FORWARD, uid, RequestHeader(**header), [x], [Compression.NONE], x.nbytes)


@contextlib.contextmanager
def lora_host(config: HandlerConfig | None = None) -> Any:
    slow = SlowExpert()
    slow_backend = ExpertBackend(
        "slow.0", slow, args_schema=lora_backend(LoraExpert()).args_schema, max_batch_size=2**16
    )
    with Host({"lora.0": lora_backend(LoraExpert(), max_batch_size=2**16), "slow.0": slow_backend}, config) as host:
        yield host


@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_all_sizes_at_once_are_exact(kind: str) -> None:
    with lora_host() as host:
        module = host.backends["lora.0"].module
        inputs = [torch.randn(rows, 5, HIDDEN) for rows in (1, 0, 7, 20_000, 3, 40_000, 1, 1000)]

        async def work(client: DirectClient) -> list[Reply]:
            return await asyncio.gather(*(client.call(forward_call(x), 30.0) for x in inputs))

        replies = host.run(work, kind)
        for x, reply in zip(inputs, replies):
            assert torch.allclose(reply.tensors[0], module(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_with_globals_and_lossy_codecs(kind: str) -> None:
    compressed = BatchTensorProto(None, HIDDEN, compression=Compression.FLOAT16)
    backend = ExpertBackend(
        "lora.0",
        LoraExpert(),
        args_schema=(compressed,),
        kwargs_schema=LORA_KWARGS,
        optional_kwargs=tuple(LORA_KWARGS),
        outputs_schema=compressed,
    )
    with Host({"lora.0": backend}) as host:
        x, a, b = torch.randn(300, 5, HIDDEN), torch.randn(HIDDEN, 3), torch.randn(3, HIDDEN)
        grad = torch.randn(300, 5, HIDDEN)
        header = RequestHeader(present=("lora_a", "lora_b"), wants_grad=(True, True, True), request_id=new_request_id())
        call = Call(BACKWARD, "lora.0", header, [x, a, b, grad], [Compression.FLOAT16, 0, 0, Compression.FLOAT16])
        reply = host.run(lambda client: client.call(call, 30.0), kind)
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        host.backends["lora.0"].module(leaves[0], lora_a=leaves[1], lora_b=leaves[2]).backward(grad)
        for received, leaf in zip(reply.tensors, leaves, strict=True):
            assert leaf.grad is not None
            assert torch.allclose(received, leaf.grad, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("length", [5, 25_000])  # 38 MB
def test_received_tensors_are_aligned_and_writable(length: int) -> None:
    with lora_host() as host:
        reply = host.run(lambda client: client.call(forward_call(torch.randn(64, length, HIDDEN)), 30.0), "unix")
        assert reply.tensors[0].data_ptr() % 64 == 0
        reply.tensors[0].add_(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_call_harms_no_other(kind: str) -> None:
    with lora_host() as host:
        good, bad = torch.randn(20_000, 5, HIDDEN), torch.randn(20_000, 5, HIDDEN + 1)

        async def work(client: DirectClient) -> list[Any]:
            calls = [forward_call(good), forward_call(bad), forward_call(good, uid="no.such"), forward_call(good)]
            return await asyncio.gather(*(client.call(call, 30.0) for call in calls), return_exceptions=True)

        first, refused, unknown, last = host.run(work, kind)
        assert isinstance(refused, RemoteSchemaError)
        assert "args[0]" in str(refused)
        assert isinstance(unknown, ExpertNotFound)
        assert torch.equal(first.tensors[0], last.tensors[0])


def test_a_small_call_overtakes_a_large_one() -> None:
    with lora_host() as host:
        order: list[str] = []

        async def work(client: DirectClient) -> None:
            async def one(name: str, x: torch.Tensor) -> None:
                await client.call(forward_call(x), 30.0)
                order.append(name)

            await asyncio.gather(one("large", torch.randn(60_000, 30, HIDDEN)), one("small", torch.randn(1, 1, HIDDEN)))

        host.run(work, "unix")
        assert order == ["small", "large"]


def test_time_out_withdraws_the_call_and_the_link_lives_on() -> None:
    with lora_host() as host:
        host.backends["slow.0"].module.delay_s = 0.5

        async def work(client: DirectClient) -> Reply:
            with pytest.raises(CallTimeout):
                await client.call(forward_call(torch.ones(1, 1, HIDDEN), uid="slow.0"), 0.05)
            return await client.call(forward_call(torch.ones(1, 1, HIDDEN), uid="slow.0"), 30.0)

        assert host.run(work, "unix").tensors[0][0, 0, 0] == 2
        host.await_release()


def test_a_server_that_stops_sends_the_answers_it_has() -> None:
    with lora_host() as host:
        host.backends["slow.0"].module.delay_s = 0.3

        async def work(client: DirectClient) -> Reply:
            calling = asyncio.ensure_future(client.call(forward_call(torch.ones(1, 1, HIDDEN), uid="slow.0"), 30.0))
            await asyncio.sleep(0.1)
            host.server_loop.submit(host.direct.stop(grace_s=10.0))
            return await calling

        assert host.run(work, "unix").tensors[0][0, 0, 0] == 2


def test_callers_of_a_lost_link_get_an_error_at_once() -> None:
    with lora_host() as host:
        host.backends["slow.0"].module.delay_s = 1.0

        async def work(client: DirectClient) -> None:
            calling = asyncio.ensure_future(client.call(forward_call(torch.ones(1, 1, HIDDEN), uid="slow.0"), 30.0))
            await asyncio.sleep(0.1)
            host.server_loop.submit(host.direct.stop(grace_s=0.0))
            with pytest.raises(PeerGone):
                await asyncio.wait_for(calling, 5.0)

        host.run(work, "unix")


# --- by threads that wait ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_threads_call_over_one_link_at_once(kind: str) -> None:
    with lora_host() as host, host.link(kind) as client:
        module = host.backends["lora.0"].module
        rows = [1, 3, 200, 20_000, 1, 70_000, 0, 5]  # large ones are chunked, and go on being sent by the event loop

        def call(count: int) -> None:
            for _ in range(4):
                x = torch.randn(count, 5, HIDDEN)
                (output,) = client.call_blocking(forward_call(x), 30.0).tensors
                assert output.shape == x.shape
                if count:
                    torch.testing.assert_close(output[-1:], module(x[-1:]))

        in_parallel([partial(call, count) for count in rows])
        host.await_release()


@pytest.mark.parametrize("kind", KINDS)
def test_a_thread_whose_time_is_over_is_told_and_the_call_withdrawn(kind: str) -> None:
    with lora_host() as host, host.link(kind) as client:
        host.backends["slow.0"].module.delay_s = 0.5
        call = forward_call(torch.ones(1, 1, HIDDEN), uid="slow.0")
        start = time.monotonic()
        with pytest.raises(CallTimeout, match=r"forward of slow.0: no answer within 0.05 s"):
            client.call_blocking(call, 0.05)
        assert time.monotonic() - start < 0.4
        assert client.call_blocking(call, 30.0).tensors[0][0, 0, 0] == 2
        host.await_release()


def test_a_refused_call_of_a_thread_harms_no_other() -> None:
    with lora_host() as host, host.link("unix") as client:
        with pytest.raises(RemoteSchemaError, match=r"args\[0\]"):
            client.call_blocking(forward_call(torch.randn(20_000, 5, HIDDEN + 1)), 30.0)
        with pytest.raises(ExpertNotFound):
            client.call_blocking(forward_call(torch.randn(1, 5, HIDDEN), uid="no.such"), 30.0)
        assert client.call_blocking(forward_call(torch.randn(2, 5, HIDDEN)), 30.0).tensors[0].shape == (2, 5, HIDDEN)


@pytest.mark.parametrize("who", ["server", "client's event loop"])
def test_threads_that_wait_get_an_error_at_once_when_the_link_is_lost(who: str) -> None:
    with lora_host() as host, host.link("unix") as client:
        host.backends["slow.0"].module.delay_s = 1.0

        def end() -> None:
            time.sleep(0.1)
            if who == "server":
                host.server_loop.run(host.direct.stop(grace_s=0.0), 10.0)
            else:
                host.client_loop.stop()

        def call() -> None:
            start = time.monotonic()
            with pytest.raises(PeerGone):
                client.call_blocking(forward_call(torch.ones(1, 1, HIDDEN), uid="slow.0"), None)
            assert time.monotonic() - start < 0.9

        in_parallel([call, call, end])
        assert not client.takes_blocking_calls
        with pytest.raises(PeerGone):
            client.call_blocking(forward_call(torch.ones(1, 1, HIDDEN)), 30.0)


def test_the_event_loop_itself_makes_no_blocking_calls() -> None:
    with lora_host() as host, host.link("unix") as client:

        async def asked() -> bool:
            return client.takes_blocking_calls

        assert client.takes_blocking_calls
        assert not host.client_loop.run(asked(), 5.0)


class Odd(torch.nn.Module):
    """Returns what cannot be sent."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to_sparse()


def test_an_answer_that_cannot_be_sent_is_an_error_and_not_silence() -> None:
    schemas: dict[str, Any] = {"args_schema": (BatchTensorProto(HIDDEN),), "outputs_schema": BatchTensorProto(HIDDEN)}
    with Host({"odd.0": ExpertBackend("odd.0", Odd(), **schemas)}) as host, host.link("unix") as client:
        for rows in (1, 1, 4000):
            with pytest.raises(ExpertFailed, match="cannot be sent"):
                client.call_blocking(forward_call(torch.ones(rows, HIDDEN), uid="odd.0"), 10.0)
        host.await_release()


@pytest.mark.parametrize("kind", KINDS)
def test_a_ticket_is_good_for_one_link(kind: str) -> None:
    with lora_host() as host:
        ticket = host.ticket()
        first = dial(ticket, kind)
        with pytest.raises(ConnectError):
            dial(ticket, kind)
        first.close()


def test_a_server_with_another_certificate_is_not_talked_to() -> None:
    with lora_host() as host:
        ticket = host.ticket()
        forged = Ticket(secret=ticket.secret, proof=ticket.proof, addresses=ticket.addresses, fingerprint=b"x" * 32)
        with pytest.raises(ConnectError, match="certificate"):
            dial(forged, "tls")


def test_a_server_without_the_proof_is_not_talked_to() -> None:
    with lora_host() as host:
        ticket = host.ticket()
        forged = Ticket(
            secret=ticket.secret, proof=b"x" * 32, unix_path=ticket.unix_path, fingerprint=ticket.fingerprint
        )
        with pytest.raises(ConnectError, match="has not issued"):
            dial(forged, "unix")


def connect(host: Host, kind: str) -> socket.socket:
    """What a stranger can do: connect, and no more."""
    ticket = host.ticket()
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(ticket.unix_path)
        return sock
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection(ticket.addresses[0]))


def hang_up(sock: socket.socket) -> bytes:
    """What the other side sends before it closes."""
    sock.settimeout(10.0)
    received = b""
    with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
        while data := sock.recv(1000):
            received += data
    sock.close()
    return received


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "first",
    [encode_frame(HELLO, 0, bytes(32)), bytes(range(48)), encode_frame(OPEN, 1, bytes(32))],
    ids=["forged ticket", "garbage", "no ticket"],
)
def test_strangers_get_nothing(kind: str, first: bytes) -> None:
    with lora_host() as host:
        sock = connect(host, kind)
        sock.sendall(first)
        assert hang_up(sock) == b""
        assert host.links() == 0


def raw_link(host: Host) -> socket.socket:
    """A link in the hands of a peer that has a ticket and no manners."""
    sock = dial(host.ticket("mallory"), "unix")
    sock.settimeout(10.0)
    return sock


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(range(256)) * 16,
        HEADER.pack(DATA, 7, 100) + bytes(100),
        HEADER.pack(OPEN, 1, 2**50),
        encode_frame(OPEN, 1, b"?"),
    ],
    ids=["random", "data of no call", "endless opening", "malformed opening"],
)
def test_garbage_cuts_off_its_sender_and_nobody_else(garbage: bytes) -> None:
    with lora_host() as host:

        async def work(client: DirectClient) -> Reply:
            sock = raw_link(host)
            sock.sendall(garbage)
            await asyncio.get_running_loop().run_in_executor(None, hang_up, sock)
            return await client.call(forward_call(torch.ones(2, 1, HIDDEN), uid="slow.0"), 30.0)

        assert host.run(work, "unix").tensors[0][0, 0, 0] == 2


def test_a_peer_that_never_reads_is_cut_off() -> None:
    with lora_host(HandlerConfig(read_timeout_s=0.5)) as host:
        sock = raw_link(host)
        sock.close()

        async def greedy(client: DirectClient) -> None:
            asyncio.get_running_loop().remove_reader(client.link._sock)  # asks for much and takes nothing
            x = torch.ones(60_000, 5, HIDDEN)
            with contextlib.suppress(MoEError):
                await client.call(forward_call(x, uid="slow.0"), 3.0)

        host.run(greedy, "unix")
        assert host.links() == 0
        host.await_release()


def test_links_of_one_peer_are_bounded() -> None:
    with lora_host() as host:
        socks = [raw_link(host) for _ in range(12)]
        assert host.links() <= 8
        for sock in socks:
            sock.close()


class LibP2P:
    """Stands for libp2p below AutoTransport."""

    def __init__(self, host: Host, ticket: Callable[[], Ticket]):
        self.host, self._ticket, self.calls = host, ticket, 0

    async def info(self, peer: Any, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        return self.host.handler.describe("client", uid)

    async def call(self, peer: Any, call: Call, *, timeout_s: float | None) -> Reply:
        self.calls += 1
        return Reply(None, [])

    async def ticket(self, peer: Any, *, timeout_s: float | None) -> Ticket:
        return self._ticket()

    async def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def auto(
    host: Host, ticket: Callable[[], Ticket], mode: str = "auto"
) -> AsyncIterator[tuple[AutoTransport, LibP2P]]:
    below = LibP2P(host, ticket)
    transport = AutoTransport(below, mode)
    try:
        yield transport, below
    finally:
        await transport.close()


def test_auto_takes_one_link_for_many_calls() -> None:
    with lora_host() as host:

        async def work() -> tuple[int, int]:
            async with auto(host, host.ticket) as (transport, below):
                call = forward_call(torch.ones(2, 1, HIDDEN))
                await asyncio.gather(*(transport.call(MemoryPeer("s"), call, timeout_s=10.0) for _ in range(20)))
                return below.calls, host.links()

        assert host.client_loop.run(work(), 30.0) == (0, 1)


def no_ticket() -> Ticket:
    raise ConnectError("an old peer")


def nowhere() -> Ticket:
    return Ticket(secret=bytes(32), proof=bytes(32), unix_path="/nonexistent", fingerprint=bytes(32))


@pytest.mark.parametrize("ticket", [no_ticket, nowhere])
def test_auto_falls_back_silently_and_strict_modes_do_not(ticket: Callable[[], Ticket]) -> None:
    with lora_host() as host:

        async def work() -> int:
            call = forward_call(torch.ones(2, 1, HIDDEN))
            async with auto(host, ticket) as (transport, below):
                for _ in range(3):
                    await transport.call(MemoryPeer("s"), call, timeout_s=10.0)
            async with auto(host, ticket, "unix") as (strict, _):
                with pytest.raises(ConnectError):
                    await strict.call(MemoryPeer("s"), call, timeout_s=10.0)
            return below.calls

        assert host.client_loop.run(work(), 30.0) == 3


def test_auto_dials_again_after_a_link_is_lost() -> None:
    with lora_host() as host:

        async def work() -> int:
            async with auto(host, host.ticket) as (transport, below):
                call = forward_call(torch.ones(2, 1, HIDDEN))
                await transport.call(MemoryPeer("s"), call, timeout_s=10.0)
                next(iter(transport._links.values())).close()
                await transport.call(MemoryPeer("s"), call, timeout_s=10.0)
                return below.calls

        assert host.client_loop.run(work(), 30.0) == 0
