"""Experts one can host: the built-in ones, registering one's own, and learning-rate schedules by name."""

from moe.server.layers import adapted, common, dropout  # register the built-in experts
from moe.server.layers.custom_experts import (
    add_custom_models_from_file,
    build_expert,
    expert_schema,
    name_to_block,
    name_to_input,
    name_to_schema,
    register_expert_class,
)
from moe.server.layers.lr_schedule import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    schedule_name_to_scheduler,
)

__all__ = [
    "adapted",
    "add_custom_models_from_file",
    "build_expert",
    "common",
    "dropout",
    "expert_schema",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_linear_schedule_with_warmup",
    "name_to_block",
    "name_to_input",
    "name_to_schema",
    "register_expert_class",
    "schedule_name_to_scheduler",
]
