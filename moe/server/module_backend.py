"""The import path hivemind's users know for ModuleBackend; it lives in ``moe.server.expert_backend``."""

from moe.server.expert_backend import ExpertBackend, ModuleBackend

__all__ = ["ExpertBackend", "ModuleBackend"]
