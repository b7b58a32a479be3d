"""Learning-rate schedules as multipliers of the base rate, for `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from taming.util import instantiate_from_config

logger = logging.getLogger(__name__)


def multipliers(optimizers: Sequence[Optimizer], scheduler_config: Any) -> list[dict[str, Any]]:
    """For each optimizer what Lightning moves after every step: its learning rate, multiplied by the configured `schedule`."""
    schedule = instantiate_from_config(scheduler_config).schedule
    return [
        {"scheduler": LambdaLR(o, lr_lambda=schedule), "interval": "step", "frequency": 1} for o in optimizers
    ]


def cosine_between(progress: float, high: float, low: float) -> float:
    """Half a cosine from `high` at progress 0 to `low` at 1 and beyond."""
    return low + 0.5 * (high - low) * (1 + math.cos(min(progress, 1.0) * math.pi))


class LambdaWarmUpCosineScheduler:
    """Linear warm-up, then half a cosine down, then constant.

    Args:
        warm_up_steps: length of the warm-up.
        lr_min: value at the end.
        lr_max: value after the warm-up.
        lr_start: value at step 0.
        max_decay_steps: step at which `lr_min` is reached.
        verbosity_interval: log the value every so many steps; 0 for never.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        self.lr_warm_up_steps = warm_up_steps
        self.lr_min, self.lr_max, self.lr_start = lr_min, lr_max, lr_start
        self.lr_max_decay_steps = max_decay_steps
        self.last_lr = 0.0
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int) -> float:
        """The multiplier at step n."""
        if self.verbosity_interval > 0 and n % self.verbosity_interval == 0:
            logger.info("step %d: learning-rate multiplier %g", n, self.last_lr)
        if n < self.lr_warm_up_steps:
            self.last_lr = self.lr_start + (self.lr_max - self.lr_start) * n / self.lr_warm_up_steps
        else:
            progress = (n - self.lr_warm_up_steps) / (self.lr_max_decay_steps - self.lr_warm_up_steps)
            self.last_lr = cosine_between(progress, self.lr_max, self.lr_min)
        return self.last_lr

    def __call__(self, n: int) -> float:
        """As `schedule`."""
        return self.schedule(n)
