"""Adapters of a client, and the files of peft. Owns: the names that are imported from here."""

from __future__ import annotations

from moe.client.adapters.modules import BlockAdapter as BlockAdapter
from moe.client.adapters.modules import Ia3Adapter as Ia3Adapter
from moe.client.adapters.modules import LoraAdapter as LoraAdapter
from moe.client.adapters.modules import PrefixAdapter as PrefixAdapter
from moe.client.adapters.modules import SoftPrompt as SoftPrompt
from moe.client.adapters.modules import combine as combine
from moe.client.adapters.peft import from_peft as from_peft
from moe.client.adapters.peft import load_peft as load_peft
from moe.client.adapters.peft import save_peft as save_peft
from moe.client.adapters.peft import to_peft as to_peft
from moe.client.adapters.prompts import DeepPrompts as DeepPrompts
