"""The calling side: remote experts, mixtures and sequences of them that behave like local modules.

Hands on its public names, as hivemind's package does, when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe.lazy import lazy_names

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
    from moe.client.expert import create_remote_experts as create_remote_experts
    from moe.client.expert import get_experts as get_experts
    from moe.client.moe import RemoteMixtureOfExperts as RemoteMixtureOfExperts
    from moe.client.pretrained import DistributedModel as DistributedModel
    from moe.client.remote_expert_worker import RemoteExpertWorker as RemoteExpertWorker
    from moe.client.sequence_manager import SequenceManager as SequenceManager
    from moe.client.sequential import RemoteSequential as RemoteSequential
    from moe.client.switch_moe import RemoteSwitchMixtureOfExperts as RemoteSwitchMixtureOfExperts

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
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
        "moe.client.expert": ("RemoteExpert", "create_remote_experts", "get_experts"),
        "moe.client.moe": ("RemoteMixtureOfExperts",),
        "moe.client.pretrained": ("DistributedModel",),
        "moe.client.remote_expert_worker": ("RemoteExpertWorker",),
        "moe.client.sequence_manager": ("SequenceManager",),
        "moe.client.sequential": ("RemoteSequential",),
        "moe.client.switch_moe": ("RemoteSwitchMixtureOfExperts",),
    },
    modules=("beam_search", "expert", "moe", "remote_expert_worker", "switch_moe"),
)
