"""What is stored in the DHT and how it is read. Owns: keys, values, announcing, retracting, and the DHT process.

``records`` knows what keys and values mean (pure), ``process`` starts, stops and asks the DHT's process, ``experts``
declares, retracts and finds, ``announcer`` keeps declaring, ``pings`` measures round trips. Nothing else in this package
knows a key of the DHT.
"""

from hivemind.dht import DHT
from hivemind.p2p import PeerID, PeerInfo
from hivemind.utils import get_dht_time

from moe.dht.announcer import Announcer, AnnouncerStatistics
from moe.dht.experts import (
    check_uids,
    declare_experts,
    fetch_prefixes,
    find_experts,
    find_servers,
    list_servers,
    retract_experts,
)
from moe.dht.pings import ping_peers
from moe.dht.process import check_dht, peers_line, resolve_p2p, start_dht, stop_dht, visible_addresses, visible_peer
from moe.dht.records import FoundExpert, ServerInfo, ServerState, Successor, Successors

__all__ = [
    "DHT",
    "Announcer",
    "AnnouncerStatistics",
    "FoundExpert",
    "PeerID",
    "PeerInfo",
    "ServerInfo",
    "ServerState",
    "Successor",
    "Successors",
    "check_dht",
    "check_uids",
    "declare_experts",
    "fetch_prefixes",
    "find_experts",
    "find_servers",
    "get_dht_time",
    "list_servers",
    "peers_line",
    "ping_peers",
    "resolve_p2p",
    "retract_experts",
    "start_dht",
    "stop_dht",
    "visible_addresses",
    "visible_peer",
]
