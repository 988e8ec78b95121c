"""Learning-rate schedules of experts by name. All take the same arguments, so that a server can pick one by its name."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moe.errors import ConfigError

SchedulerFactory = Callable[..., LambdaLR]


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int | None, num_training_steps: int | None
) -> LambdaLR:
    """From 0 up to the optimizer's learning rate during warmup, then down to 0, both linearly. hivemind's numbers.

    :param optimizer: whose learning rate is scheduled
    :param num_warmup_steps: None or 0: no warmup
    :param num_training_steps: when 0 is reached, warmup included
    :raises ConfigError: no optimizer, or bad numbers of steps
    """
    return _with_warmup(optimizer, num_warmup_steps, _required(num_training_steps, "linear"), lambda left: left)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int | None, num_training_steps: int | None
) -> LambdaLR:
    """Like the linear schedule, but down along half a cosine; stays at 0 afterwards. Parameters as there."""
    steps = _required(num_training_steps, "cosine")
    return _with_warmup(optimizer, num_warmup_steps, steps, lambda left: 0.5 * (1.0 - math.cos(math.pi * left)))


def get_constant_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int | None, num_training_steps: int | None = None
) -> LambdaLR:
    """Like the linear schedule, but constant after the warmup. Parameters as there; the total is not looked at."""
    return _with_warmup(optimizer, num_warmup_steps, None, lambda left: 1.0)


schedule_name_to_scheduler: dict[str, SchedulerFactory | None] = {
    "linear": get_linear_schedule_with_warmup,
    "constant": get_constant_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "none": None,
}


def _required(num_training_steps: int | None, name: str) -> int:
    if num_training_steps is None:
        raise ConfigError(f"schedule {name!r} needs num_training_steps")
    return num_training_steps


def _with_warmup(
    optimizer: Optimizer, warmup_steps: int | None, training_steps: int | None, decay: Callable[[float], float]
) -> LambdaLR:
    """``decay`` maps the share of the steps after warmup that is left, 1 to 0, to a factor of the learning rate."""
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"a learning-rate schedule needs an optimizer, got {optimizer!r}")
    warmup = 0 if warmup_steps is None else warmup_steps
    if warmup < 0 or (training_steps is not None and training_steps < 0):
        raise ConfigError(f"numbers of steps cannot be negative: warmup {warmup}, total {training_steps}")

    def factor(step: int) -> float:
        if step < warmup:
            return float(step) / float(max(1, warmup))
        if training_steps is None:
            return decay(1.0)
        return decay(max(0.0, float(training_steps - step) / float(max(1, training_steps - warmup))))

    return LambdaLR(optimizer, factor)
