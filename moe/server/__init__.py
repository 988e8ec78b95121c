"""The serving side: backends, pools, the Runtime, the handler and the Server that holds them together.

Hands on its public names, as hivemind's package does, when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe.lazy import lazy_names

if TYPE_CHECKING:
    from moe.client.expert import get_experts as get_experts
    from moe.dht import declare_experts as declare_experts
    from moe.server.background import background_server as background_server
    from moe.server.connection_handler import ConnectionHandler as ConnectionHandler
    from moe.server.expert_backend import ExpertBackend as ExpertBackend
    from moe.server.expert_backend import ModuleBackend as ModuleBackend
    from moe.server.layers import register_expert_class as register_expert_class
    from moe.server.runtime import Runtime as Runtime
    from moe.server.server import Server as Server
    from moe.server.task_pool import TaskPool as TaskPool

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "moe.client.expert": ("get_experts",),  # where hivemind's users look for it; no server loads it
        "moe.dht": ("declare_experts",),
        "moe.server.background": ("background_server",),
        "moe.server.connection_handler": ("ConnectionHandler",),
        "moe.server.expert_backend": ("ExpertBackend", "ModuleBackend"),
        "moe.server.layers": ("register_expert_class",),
        "moe.server.runtime": ("Runtime",),
        "moe.server.server": ("Server",),
        "moe.server.task_pool": ("TaskPool",),
    },
    modules=(
        "checkpoints",
        "connection_handler",
        "dht_handler",
        "layers",
        "module_backend",
        "runtime",
        "server",
        "task_pool",
    ),
)
