"""The import path hivemind's users know for the optimizer wrappers; they live in ``moe.server.optim``."""

from moe.server.optim import ClippingWrapper, MoEOptimizer, OptimizerWrapper

__all__ = ["ClippingWrapper", "MoEOptimizer", "OptimizerWrapper"]
