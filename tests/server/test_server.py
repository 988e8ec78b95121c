"""How settings reach the parts of a Server, without starting one."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from moe.client.expert import get_experts
from moe.config import HandlerConfig, ServerConfig
from moe.dht import peers_line, start_dht, stop_dht
from moe.errors import ConfigError
from moe.schema import BatchTensorProto
from moe.server import assembly
from moe.server.expert_backend import ExpertBackend
from moe.server.heap import IDLE_BEFORE_TRIM_S
from moe.server.server import Server, listen_hosts

LOOPBACK = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"]}


@pytest.fixture
def no_dht(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assemble without any process."""
    monkeypatch.setattr(assembly, "start_dht", lambda *args, **kwargs: SimpleNamespace(kwargs=kwargs))
    monkeypatch.setattr(gc, "freeze", lambda: None)


def assemble(**options: Any) -> dict[str, Any]:
    parts = assembly.assemble(
        expert_uids=["nop.0"], expert_cls="nop", hidden_dim=8, throughput=None, device="cpu", **options
    )
    return parts.server_options


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_dht")
def test_no_default_of_a_parameter_wins_over_a_setting_that_was_given() -> None:
    """Each setting of the two configs that a parameter can change, too."""
    config = ServerConfig(
        update_period_s=7.0, expiration_s=70.0, stats_report_interval_s=3.0, checkpoint_period_s=5.0, keep_checkpoints=9,
        stop_timeout_s=11.0, direct=False, direct_port=31337, direct_hosts=("a.example",), balance_period_s=4.0,
        balance_quality=0.0,
    )  # fmt: skip
    handler_config = HandlerConfig(request_timeout_s=2.0, held_max_bytes=1000, held_max_bytes_per_peer=999)
    options = assemble(config=config, handler_config=handler_config)
    assert options["config"] == config
    assert options["handler_config"] == handler_config
    assert assemble()["config"] == ServerConfig(balance_quality=0.0)


@pytest.mark.usefixtures("no_dht")
def test_a_parameter_that_was_given_wins() -> None:
    options = assemble(
        config=ServerConfig(update_period_s=7.0, stop_timeout_s=11.0),
        handler_config=HandlerConfig(held_max_bytes_per_peer=3),
        update_period=30, stop_timeout_s=300.0, held_max_bytes=8,
    )  # fmt: skip
    assert (options["config"].update_period_s, options["config"].stop_timeout_s) == (30, 300.0)
    assert (options["handler_config"].held_max_bytes, options["handler_config"].held_max_bytes_per_peer) == (8, 3)


def linear(uid: str) -> ExpertBackend:
    return ExpertBackend(uid, torch.nn.Linear(4, 4), args_schema=(BatchTensorProto(4),))


@pytest.mark.parametrize("uid", ["linear", "linear.01", "linear.0.", ".0", ""])
def test_experts_that_nobody_could_call_are_refused_by_name(uid: str) -> None:
    dht: Any = SimpleNamespace(kwargs={})
    with pytest.raises(ConfigError, match="is not a valid expert uid"):
        Server(dht, {"linear.0": linear("linear.0"), uid: linear("linear.1")})


# --- where the direct link listens ------------------------------------------------------------------------------------


def hosts_of(*maddrs: str, **kwargs: Any) -> tuple[str, ...]:
    dht: Any = SimpleNamespace(kwargs={"host_maddrs": list(maddrs), **kwargs} if maddrs else kwargs)
    return listen_hosts(dht)


@pytest.mark.parametrize(
    ("maddrs", "expected"),
    [
        ((), ("127.0.0.1",)),  # as hivemind
        (("/ip4/127.0.0.1/tcp/0",), ("127.0.0.1",)),
        (("/ip4/0.0.0.0/tcp/31330",), ("0.0.0.0",)),
        (("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic"), ("127.0.0.1",)),
        (("/ip4/127.0.0.2/tcp/0", "/ip4/127.0.0.1/tcp/0"), ("127.0.0.2", "127.0.0.1")),
        (("/ip4/127.0.0.1/tcp/31331", "/ip4/0.0.0.0/tcp/31330"), ("0.0.0.0",)),
        (("/dns4/localhost/tcp/0",), ("127.0.0.1",)),
        (("/ip4/127.0.0.1/tcp/0", "/ip4/203.0.113.5/tcp/0"), ("127.0.0.1",)),  # one that is not ours
        (("/ip4/127.0.0.1/tcp/0", "/dns4/no.such.name.invalid/tcp/0"), ("127.0.0.1",)),
        (("/unix/tmp/socket",), ()),
    ],
)
def test_the_direct_link_listens_where_libp2p_does(maddrs: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert hosts_of(*maddrs) == expected


@pytest.mark.parametrize("kwargs", [{"client_mode": True}, {"no_listen": True}])
def test_a_node_that_listens_nowhere(kwargs: dict[str, Any]) -> None:
    assert hosts_of("/ip4/0.0.0.0/tcp/0", **kwargs) == ()


def test_listeners_of_a_real_server(tmp_path: Path) -> None:
    dht = start_dht(host_maddrs=["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.2/tcp/0"])
    server = Server(dht, {"linear.0": linear("linear.0")}, start=True)
    try:
        own = [at.laddr for at in psutil.Process().net_connections("inet") if at.status == psutil.CONN_LISTEN]
        assert {at.ip for at in own} == {"127.0.0.1", "127.0.0.2"}
        assert len({at.port for at in own}) == 1
    finally:
        server.shutdown()
    assert not dht.is_alive()


def test_what_a_part_refuses_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError("authorize: expected an ordinary function")

    monkeypatch.setattr("moe.server.server.ConnectionHandler", refuse)
    with pytest.raises(ConfigError, match="ordinary function"):
        Server.create(expert_uids=["nop.0"], expert_cls="nop", hidden_dim=8, throughput=None, start=False, **LOOPBACK)
    assert gc.get_freeze_count() == 0


def test_freed_memory_is_given_back_when_nobody_has_called_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = threading.Event()
    monkeypatch.setattr("moe.server.heap.trim_heap", trimmed.set)
    dht = start_dht(**LOOPBACK)
    server = Server(dht, {"linear.0": linear("linear.0")}, start=True)
    try:
        assert not trimmed.wait(2 * IDLE_BEFORE_TRIM_S), "there was no work yet"
        caller = start_dht(peers_line(dht).split()[1:], client_mode=True)
        try:
            (expert,) = get_experts(caller, ["linear.0"])
            expert(torch.zeros(2, 4))
        finally:
            stop_dht(caller)
        assert trimmed.wait(IDLE_BEFORE_TRIM_S + 10.0)
    finally:
        server.shutdown()


def test_a_server_that_never_started_stops(tmp_path: Path) -> None:
    dht = start_dht(**LOOPBACK)
    server = Server(dht, {"linear.0": linear("linear.0")}, checkpoint_dir=tmp_path)
    server.shutdown()
    assert not server.is_saving and server.lost == {} and not dht.is_alive()
    stop_dht(dht)
