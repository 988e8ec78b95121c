"""``moe-status``: flags, JSON, tables, exit codes; on a real DHT at the end."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe.cli.display import PlainFormatter, printable
from moe.cli.status import describe, main
from moe.dht import ServerInfo, ServerState, declare_experts, get_dht_time, peers_line, start_dht, stop_dht
from moe.errors import LifecycleError

ROOT = Path(__file__).resolve().parents[2]
PEER = "/ip4/203.0.113.5/tcp/31330/p2p/12D3KooWFDB41gDnfxFZdSbL8T3oxh8Z2AkbWpaBqGWrEaFoVEJo"
NOW = 1000.0
SERVERS = [
    ServerInfo(
        peer_id="12D3KooWA", uids=("ffn.0.10", "ffn.0.2"), version="0.1.0", dtype="float32", device="cpu",
        throughput_rows_per_s=120.5, pending_tasks=3, started_at=900.0, expiration_time=NOW + 41.25,
        addresses=("tcp://203.0.113.5:31331",),
    ),
    ServerInfo(peer_id="12D3KooWB", uids=("ffn.0.2",), state=ServerState.OFFLINE, expiration_time=NOW + 5),
    ServerInfo(peer_id="12D3KooWC", uids=("ffn.0.3",), expiration_time=NOW - 1),
]  # fmt: skip


def fetch(initial_peers: Sequence[str], timeout_s: float) -> tuple[list[ServerInfo], float]:
    assert list(initial_peers) == [PEER]
    return SERVERS, NOW


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--initial_peers", PEER, "--json"], fetch) == 0
    status = json.loads(capsys.readouterr().out)
    assert status == describe(SERVERS, NOW)
    assert status["servers"][0] == {
        "peer_id": "12D3KooWA", "alive": True, "state": "online", "version": "0.1.0", "dtype": "float32",
        "device": "cpu", "throughput_rows_per_s": 120.5, "pending_tasks": 3, "started_at": 900.0,
        "expires_in_s": 41.25, "addresses": ["tcp://203.0.113.5:31331"], "experts": ["ffn.0.10", "ffn.0.2"],
    }  # fmt: skip
    assert [server["alive"] for server in status["servers"]] == [True, False, False]
    assert status["experts"] == [
        {"uid": "ffn.0.2", "alive": True, "servers": ["12D3KooWA", "12D3KooWB"]},
        {"uid": "ffn.0.3", "alive": False, "servers": ["12D3KooWC"]},
        {"uid": "ffn.0.10", "alive": True, "servers": ["12D3KooWA"]},
    ]


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["--initial_peers", PEER], fetch) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["3", "servers"] in rows
    assert ["12D3KooWA", "yes", "online", "0.1.0", "cpu", "float32", "120.5", "3", "2"] in rows
    assert ["3", "experts"] in rows
    assert ["ffn.0.2", "yes", "12D3KooWA,", "12D3KooWB"] in rows
    assert ["ffn.0.3", "no", "12D3KooWC"] in rows


HOSTILE = [
    "[/x]", "[link=http://evil]click[/link]", "[red]", ":smile:", "\x1b[2J\x1b]0;owned\x07", "\r\n12D3KooWfake yes",
    "\u202egnp,exe", "\x9b31m", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_peers_write_is_shown_as_text(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every place of a record that holds a string; the terminal's own colours are the only escapes."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("FORCE_COLOR", "1")
    info = ServerInfo(
        peer_id=text, uids=(f"{text}.0",), version=text, dtype=text, device=text, addresses=(text,), moving_to=text,
        expiration_time=NOW + 1,
    )  # fmt: skip
    assert main(["--initial_peers", PEER], lambda peers, timeout_s: ([info], NOW)) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert all(char.isprintable() for char in shown.replace("\n", ""))
    assert shown.count(printable(text)) == 6  # the peer twice, its expert
    assert main(["--initial_peers", PEER, "--json"], lambda peers, timeout_s: ([info], NOW)) == 0
    output = capsys.readouterr().out
    assert all(char.isprintable() for char in output.replace("\n", ""))
    assert json.loads(output)["servers"][0]["version"] == text


def test_errors_and_warnings_are_text_too(capsys: pytest.CaptureFixture[str]) -> None:
    def fetch(initial_peers: Sequence[str], timeout_s: float) -> Any:
        raise LifecycleError("peer says \x1b[2J")

    assert main(["--initial_peers", PEER], fetch) == 1
    assert capsys.readouterr().err == "cannot reach the swarm: peer says \\x1b[2J\n"
    record = logging.LogRecord("moe", logging.WARNING, "", 0, "skipping %s", ("\x1b]0;x\x07\nnext",), None)
    assert PlainFormatter("%(message)s").format(record) == "skipping \\x1b]0;x\\x07\nnext"


def test_an_empty_swarm_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--initial_peers", PEER, "--json"], lambda peers, timeout_s: ([], NOW)) == 0
    assert json.loads(capsys.readouterr().out) == {"servers": [], "experts": []}


def test_a_swarm_that_cannot_be_reached(capsys: pytest.CaptureFixture[str]) -> None:
    def fetch(initial_peers: Sequence[str], timeout_s: float) -> Any:
        assert timeout_s == 7.5
        raise LifecycleError("the DHT did not start within 7.5 s")

    assert main(["--initial_peers", PEER, "--timeout", "7.5"], fetch) == 1
    output = capsys.readouterr()
    assert output.err == "cannot reach the swarm: the DHT did not start within 7.5 s\n"
    assert output.out == ""


def test_interrupted() -> None:
    def fetch(initial_peers: Sequence[str], timeout_s: float) -> Any:
        raise KeyboardInterrupt

    assert main(["--initial_peers", PEER], fetch) == 130


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "required: --initial_peers"),
        (["--initial_peers"], "argument --initial_peers: expected at least one argument"),
        (["--initial_peers", "203.0.113.5:31330"], "'203.0.113.5:31330' is not a multiaddr"),
        (["--initial_peers", PEER, "--timeout", "0"], "argument --timeout: expected a positive number, got '0'"),
        (["--initial_peers", PEER, "--jsno"], "unrecognized arguments: --jsno"),
    ],
)
def test_bad_usage(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv, fetch)
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_real_swarm() -> None:
    uids = ["ffn.0.0", "ffn.0.1", "nop.7"]
    dht = start_dht(host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    try:
        peer_id = dht.peer_id.to_base58()
        declare_experts(dht, uids, get_dht_time() + 60, info=ServerInfo(version="0.1.0", device="cpu"))
        command = [sys.executable, "-m", "moe.cli.status", "--json", *peers_line(dht).split()]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        stop_dht(dht)
        assert (result.returncode, result.stderr) == (0, "")
        status = json.loads(result.stdout)
        assert [(server["peer_id"], server["alive"]) for server in status["servers"]] == [(peer_id, True)]
        assert sorted(status["servers"][0]["experts"]) == uids
        assert status["experts"] == [{"uid": uid, "alive": True, "servers": [peer_id]} for uid in uids]

        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)  # it is gone now
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith("cannot reach the swarm: ")
    finally:
        stop_dht(dht)
