"""The import path hivemind's users know for declaring experts (``moe.dht``) and finding them (``moe.client.expert``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe.lazy import lazy_names

if TYPE_CHECKING:
    from moe.client.expert import get_experts as get_experts
    from moe.dht import declare_experts as declare_experts

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"moe.dht": ("declare_experts",), "moe.client.expert": ("get_experts",)}
)
