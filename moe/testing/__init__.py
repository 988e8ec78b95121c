"""The public test kit: for tests of your own experts and clients, without a network, without waiting, with failures.

``memory_swarm`` serves experts in this process, ``FaultPlan`` scripts what goes wrong, ``FakeClock`` is time that
stands still, ``LocalSwarm`` runs real server processes on this machine and leaves nothing of them behind, ``check_idle``
looks whether a server has anything left of requests that are over.
"""

from moe.testing.clock import FakeClock
from moe.testing.faults import FaultPlan, FaultyTransport, FiredFault, InjectedFault
from moe.testing.idle import check_idle
from moe.testing.memory import MemoryServer, MemorySwarm, memory_swarm
from moe.testing.swarm import LocalSwarm
from moe.transport.memory import MemoryPeer, MemoryTransport

__all__ = [
    "FakeClock",
    "FaultPlan",
    "FaultyTransport",
    "FiredFault",
    "InjectedFault",
    "LocalSwarm",
    "MemoryPeer",
    "MemoryServer",
    "MemorySwarm",
    "MemoryTransport",
    "check_idle",
    "memory_swarm",
]
