"""A decentralized Mixture-of-Experts runtime: host torch modules as experts, find them in a DHT, train and run through them.

The public names. They are imported when first used, so that ``import moe`` costs nothing and the command line can refuse bad
settings before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe.config import ClientConfig as ClientConfig
from moe.config import HandlerConfig as HandlerConfig
from moe.config import ServerConfig as ServerConfig
from moe.lazy import lazy_names
from moe.version import __version__ as __version__

if TYPE_CHECKING:
    from moe.client.adapters import DeepPrompts as DeepPrompts
    from moe.client.adapters import Ia3Adapter as Ia3Adapter
    from moe.client.adapters import LoraAdapter as LoraAdapter
    from moe.client.adapters import PrefixAdapter as PrefixAdapter
    from moe.client.adapters import SoftPrompt as SoftPrompt
    from moe.client.adapters import combine as combine
    from moe.client.adapters import load_peft as load_peft
    from moe.client.adapters import save_peft as save_peft
    from moe.client.beam_search import MoEBeamSearcher as MoEBeamSearcher
    from moe.client.expert import RemoteExpert as RemoteExpert
    from moe.client.expert import get_experts as get_experts
    from moe.client.moe import RemoteMixtureOfExperts as RemoteMixtureOfExperts
    from moe.client.pretrained import DistributedModel as DistributedModel
    from moe.client.sequence_manager import SequenceManager as SequenceManager
    from moe.client.sequential import RemoteSequential as RemoteSequential
    from moe.client.switch_moe import RemoteSwitchMixtureOfExperts as RemoteSwitchMixtureOfExperts
    from moe.dht import DHT as DHT
    from moe.dht import declare_experts as declare_experts
    from moe.schema import BatchTensorProto as BatchTensorProto
    from moe.schema import Compression as Compression
    from moe.schema import ExpertSchema as ExpertSchema
    from moe.schema import TensorProto as TensorProto
    from moe.server.background import background_server as background_server
    from moe.server.expert_backend import ExpertBackend as ExpertBackend
    from moe.server.expert_backend import ModuleBackend as ModuleBackend
    from moe.server.layers import register_expert_class as register_expert_class
    from moe.server.server import Server as Server

_HOMES = {
    "moe.client.adapters": (
        "DeepPrompts",
        "Ia3Adapter",
        "LoraAdapter",
        "PrefixAdapter",
        "SoftPrompt",
        "combine",
        "load_peft",
        "save_peft",
    ),
    "moe.client.beam_search": ("MoEBeamSearcher",),
    "moe.client.expert": ("RemoteExpert", "get_experts"),
    "moe.client.moe": ("RemoteMixtureOfExperts",),
    "moe.client.sequence_manager": ("SequenceManager",),
    "moe.client.pretrained": ("DistributedModel",),
    "moe.client.sequential": ("RemoteSequential",),
    "moe.client.switch_moe": ("RemoteSwitchMixtureOfExperts",),
    "moe.dht": ("DHT", "declare_experts"),
    "moe.schema": ("BatchTensorProto", "Compression", "ExpertSchema", "TensorProto"),
    "moe.server.background": ("background_server",),
    "moe.server.expert_backend": ("ExpertBackend", "ModuleBackend"),
    "moe.server.layers": ("register_expert_class",),
    "moe.server.server": ("Server",),
    "moe.errors": (
        "CallTimeout",
        "ConfigError",
        "ConnectError",
        "DeadlineExceeded",
        "ExpertFailed",
        "ExpertNotFound",
        "LifecycleError",
        "MissingBlocks",
        "MoEError",
        "NoExpertsFound",
        "NonFiniteError",
        "Overloaded",
        "PeerGone",
        "ProtocolError",
        "Refused",
        "RemoteError",
        "RoutingError",
        "SchemaError",
        "TooFewExperts",
        "TransportError",
        "Unavailable",
    ),
}
# client, server and expert_uid are attributes from the beginning, as they are of hivemind.moe
__getattr__, __dir__, _lazy = lazy_names(__name__, _HOMES, modules=("client", "expert_uid", "server"))

__all__ = ["ClientConfig", "HandlerConfig", "ServerConfig", "__version__", *_lazy]
