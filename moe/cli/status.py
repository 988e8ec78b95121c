"""``moe-status``: what lives in a swarm. Owns: its flags, its tables and its JSON.

``--json`` prints one object; names are only ever added to it::

    {"servers": [{"peer_id": "12D3...", "alive": true, "state": "online", "version": "0.1.0", "dtype": "float32",
                  "device": "cpu", "throughput_rows_per_s": 120.5, "pending_tasks": 0, "started_at": 1795220606.3,
                  "expires_in_s": 41.2, "addresses": [], "experts": ["ffn.0.0", "ffn.0.1"]}],
     "experts": [{"uid": "ffn.0.0", "alive": true, "servers": ["12D3..."]}]}

A server is alive if it says it is online and has said so recently enough. Servers of the stock hivemind package say
nothing about themselves and are not listed.

Exit codes: 0 the swarm answered, even if nothing lives in it; 1 it cannot be reached; 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moe.cli.display import PlainFormatter, cell, printable
from moe.cli.parsing import Parser, peer_multiaddr, positive_float
from moe.errors import MoEError
from moe.expert_uid import UID_DELIMITER, coordinates

if TYPE_CHECKING:
    from rich.console import Console

    from moe.dht import ServerInfo

DEFAULT_TIMEOUT_S = 30.0  # joining a swarm takes a second or two, more if some of the peers given are gone; ours
INTERRUPTED = 130  # what shells report for a program ended by Ctrl+C


def main(
    argv: Sequence[str] | None = None,
    fetch: Callable[[Sequence[str], float], tuple[Sequence[ServerInfo], float]] | None = None,
) -> int:
    """Entry point of the console script.

    :param argv: arguments without the program's name; default: those of this process
    :param fetch: asks a swarm, see fetch_servers, which is the default
    :returns: exit code
    :raises SystemExit: with code 2, if the arguments are bad
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    options = parse_status_options(argv)
    try:
        servers, now = (fetch or fetch_servers)(options.initial_peers, options.timeout)
    except MoEError as e:
        print(f"cannot reach the swarm: {printable(str(e))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    status = describe(servers, now)
    if options.json:
        print(json.dumps(status, indent=2))
    else:
        from rich.console import Console

        print_tables(status, Console())
    return 0


def parse_status_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check a command line of ``moe-status``.

    :raises SystemExit: with code 2, after a message on stderr
    """
    parser = Parser(description="List the servers and experts of a swarm.")
    parser.add_argument(
        "--initial_peers", type=peer_multiaddr, nargs="+", required=True, help="addresses of peers of the swarm"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--timeout",
        type=positive_float,
        default=DEFAULT_TIMEOUT_S,
        help=f"most seconds to reach the swarm, and again to list it (default: {DEFAULT_TIMEOUT_S:g})",
    )
    options = argparse.Namespace()
    parser.parse_args(argv, namespace=options)
    return options


def fetch_servers(initial_peers: Sequence[str], timeout_s: float) -> tuple[Sequence[ServerInfo], float]:
    """Join a swarm as a mere reader, list its servers and leave. Imports torch and hivemind.

    :returns: the servers, and the DHT's time
    :raises MoEError: if the swarm cannot be reached or does not answer in time
    """
    from moe.dht import get_dht_time, list_servers, start_dht, stop_dht

    dht = start_dht(initial_peers, start_timeout_s=timeout_s, client_mode=True)
    try:
        return list_servers(dht, timeout_s), get_dht_time()
    finally:
        stop_dht(dht)


def describe(servers: Sequence[ServerInfo], now: float) -> dict[str, Any]:
    """What ``--json`` prints. Pure.

    :param servers: as list_servers gives them
    :param now: the DHT's time
    """
    described: list[dict[str, Any]] = [
        {
            "peer_id": server.peer_id,
            "alive": server.state.value == "online" and (server.expiration_time or 0.0) > now,
            "state": server.state.value,
            "version": server.version,
            "dtype": server.dtype,
            "device": server.device,
            "throughput_rows_per_s": server.throughput_rows_per_s,
            "pending_tasks": server.pending_tasks,
            "started_at": server.started_at,
            "expires_in_s": round((server.expiration_time or now) - now, 3),
            "addresses": list(server.addresses),
            "experts": list(server.uids),
        }
        for server in servers
    ]
    hosts: dict[str, list[dict[str, Any]]] = {}
    for server in described:
        for uid in server["experts"]:
            hosts.setdefault(uid, []).append(server)
    experts = [
        {
            "uid": uid,
            "alive": any(server["alive"] for server in hosts[uid]),
            "servers": [server["peer_id"] for server in hosts[uid]],
        }
        for uid in sorted(hosts, key=lambda uid: (uid.split(UID_DELIMITER)[0], coordinates(uid)))
    ]
    return {"servers": described, "experts": experts}


def print_tables(status: dict[str, Any], console: Console) -> None:
    """Show what ``describe`` gives as two tables."""
    from rich.table import Table

    servers = Table(title=_count(status["servers"], "server"))
    for name in ("server", "alive", "state", "version", "device"):
        servers.add_column(name, overflow="fold")
    for name in ("rows/s", "pending", "experts"):
        servers.add_column(name, justify="right")
    for server in status["servers"]:
        servers.add_row(
            cell(server["peer_id"]),
            _yes_or_no(server["alive"]),
            cell(server["state"]),
            cell(server["version"]),
            cell(f"{server['device']} {server['dtype']}"),
            f"{server['throughput_rows_per_s']:.1f}",
            str(server["pending_tasks"]),
            str(len(server["experts"])),
        )
    experts = Table(title=_count(status["experts"], "expert"))
    for name in ("expert", "alive", "servers"):
        experts.add_column(name, overflow="fold")
    for expert in status["experts"]:
        experts.add_row(cell(expert["uid"]), _yes_or_no(expert["alive"]), cell(", ".join(expert["servers"])))
    console.print(servers, experts)


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _yes_or_no(value: bool) -> str:
    return "[green]yes[/green]" if value else "[red]no[/red]"


if __name__ == "__main__":
    sys.exit(main())
