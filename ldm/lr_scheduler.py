"""Learning rates over the steps of a training: multipliers over one or several cycles, and `get_scheduler` for loops of one's own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from taming.lr_scheduler import LambdaWarmUpCosineScheduler, cosine_between

__all__ = [
    "LambdaLinearScheduler", "LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2", "get_scheduler",
]  # fmt: skip

logger = logging.getLogger(__name__)


class CyclicScheduler:
    """Cycles of a linear warm-up and a decay; each option is a list with one value for each cycle.

    Args:
        warm_up_steps: length of the warm-up.
        f_min: value at the end of the cycle.
        f_max: value after the warm-up.
        f_start: value at the beginning of the cycle.
        cycle_lengths: lengths. A step on the border belongs to the earlier cycle; after the last cycle its final value stays.
        verbosity_interval: log the value every so many steps; 0 for never.

    Raises:
        ValueError: lists of different lengths.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        if len({len(option) for option in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}) != 1:
            raise ValueError(
                "warm_up_steps, f_min, f_max, f_start and cycle_lengths need one value for each cycle"
            )
        self.lr_warm_up_steps = warm_up_steps
        self.f_min, self.f_max, self.f_start = f_min, f_max, f_start
        self.cycle_lengths = cycle_lengths
        self.cum_cycles = [0, *itertools.accumulate(cycle_lengths)]
        self.last_f = 0.0
        self.verbosity_interval = verbosity_interval

    def find_in_interval(self, n: int) -> int | None:
        """The cycle that step n lies in, or None after the last."""
        return next((i for i, end in enumerate(self.cum_cycles[1:]) if n <= end), None)

    def decay(self, cycle: int, n: int) -> float:
        """The multiplier at step n of a cycle, after its warm-up."""
        raise NotImplementedError

    def schedule(self, n: int) -> float:
        """The multiplier at step n."""
        cycle = self.find_in_interval(n)
        if cycle is None:
            cycle, n = len(self.cycle_lengths) - 1, self.cum_cycles[-1]
        n = n - self.cum_cycles[cycle]
        if self.verbosity_interval > 0 and n % self.verbosity_interval == 0:
            logger.info("step %d of cycle %d: learning-rate multiplier %g", n, cycle, self.last_f)
        warm_up = self.lr_warm_up_steps[cycle]
        if n < warm_up:
            self.last_f = self.f_start[cycle] + (self.f_max[cycle] - self.f_start[cycle]) * n / warm_up
        else:
            self.last_f = self.decay(cycle, n)
        return self.last_f

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaWarmUpCosineScheduler2(CyclicScheduler):
    """Linear warm-up, then half a cosine down, in each cycle; see `CyclicScheduler`."""

    def decay(self, cycle: int, n: int) -> float:
        """Half a cosine from `f_max` to `f_min`."""
        warm_up = self.lr_warm_up_steps[cycle]
        progress = (n - warm_up) / (self.cycle_lengths[cycle] - warm_up)
        return cosine_between(progress, self.f_max[cycle], self.f_min[cycle])


class LambdaLinearScheduler(CyclicScheduler):
    """Linear warm-up, then linear decay, in each cycle; see `CyclicScheduler`.

    The decay is counted from the cycle's start, as published, so it sets in a little below `f_max`.
    """

    def decay(self, cycle: int, n: int) -> float:
        """A straight line from `f_max` to `f_min`."""
        length = self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * (length - n) / length


def get_scheduler(
    optimizer: Optimizer,
    name: str = "cosine",
    num_warmup_steps: int = 0,
    num_training_steps: int | None = None,
    **options: Any,
) -> LRScheduler:
    """A learning-rate scheduler by name, made by transformers; call its `step()` after each of the optimizer's.

    ```python
    scheduler = get_scheduler(optimizer, num_warmup_steps=1000, num_training_steps=100000)
    ```

    Args:
        optimizer: whose rates are the highest ones.
        name: "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt", or
            another of `transformers.get_scheduler`.
        num_warmup_steps: the rate first rises from 0 in so many steps.
        num_training_steps: step at which it is back at 0; not needed by the constant ones.
        options: of that scheduler, such as `num_cycles`.

    Raises:
        TypeError: no optimizer, or an option that the scheduler lacks.
        ValueError: unknown name, no `num_training_steps` where it is needed, or a warm-up that is longer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"get_scheduler takes the optimizer first, not {optimizer!r}: get_scheduler(optimizer, name='linear', …)"
        )
    if num_training_steps is not None and not 0 <= num_warmup_steps <= num_training_steps:
        raise ValueError(
            f"num_warmup_steps={num_warmup_steps} must lie between 0 and num_training_steps={num_training_steps}"
        )
    from transformers import optimization  # takes seconds to import

    return optimization.get_scheduler(
        name, optimizer, num_warmup_steps, num_training_steps, scheduler_specific_kwargs=options
    )
