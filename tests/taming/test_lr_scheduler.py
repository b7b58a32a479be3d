import math

import pytest

from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler2
from taming.lr_scheduler import LambdaWarmUpCosineScheduler


def test_cosine_runs_up_down_and_stays():
    schedule = LambdaWarmUpCosineScheduler(
        warm_up_steps=10, lr_min=0.1, lr_max=1.0, lr_start=0.2, max_decay_steps=110
    )
    assert schedule(0) == pytest.approx(0.2)
    assert schedule(5) == pytest.approx(0.6)
    assert schedule(10) == pytest.approx(1.0)
    assert schedule(60) == pytest.approx(0.55)  # half-way down a cosine
    assert schedule(35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert schedule(110) == schedule(10_000) == pytest.approx(0.1)
    assert schedule.last_lr == pytest.approx(0.1)


def test_a_border_step_belongs_to_the_earlier_cycle_and_the_last_value_stays():
    schedule = LambdaWarmUpCosineScheduler2([2, 2], [0.0, 0.5], [1.0, 1.0], [0.0, 0.0], [10, 10])
    assert [schedule.find_in_interval(n) for n in (0, 10, 11, 20, 21)] == [0, 0, 1, 1, None]
    assert schedule(10) == pytest.approx(0.0) and schedule(20) == pytest.approx(0.5)
    assert schedule(1000) == pytest.approx(0.5)


def test_the_linear_decay_is_counted_from_the_start_of_the_cycle():
    schedule = LambdaLinearScheduler([10], [0.0], [1.0], [0.0], [100])
    assert schedule(9) == pytest.approx(0.9)
    assert schedule(10) == pytest.approx(0.9)  # 1 · (100 - 10) / 100, as published
    assert schedule(55) == pytest.approx(0.45)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one value for each cycle"):
        LambdaLinearScheduler([1, 2], [0.0], [1.0], [0.0], [100])
