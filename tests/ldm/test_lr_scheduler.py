"""Learning rates over a training."""

import math
import subprocess
import sys

import pytest
import torch

from ldm.lr_scheduler import LambdaWarmUpCosineScheduler, get_scheduler


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)


def rates(optimizer, scheduler, n):
    out = []
    for _ in range(n):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_by_default_a_warm_up_then_half_a_cosine_down_to_nothing(optimizer):
    scheduler = get_scheduler(optimizer, num_warmup_steps=4, num_training_steps=12)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    expected = [0.5 * n / 4 for n in range(4)]
    expected += [0.25 * (1 + math.cos(math.pi * n / 8)) for n in range(9)]
    assert rates(optimizer, scheduler, 13) == pytest.approx(expected)


def test_the_cosine_is_that_of_the_published_multiplier(optimizer):
    published = LambdaWarmUpCosineScheduler(4, lr_min=0.0, lr_max=1.0, lr_start=0.0, max_decay_steps=12)
    ours = rates(optimizer, get_scheduler(optimizer, num_warmup_steps=4, num_training_steps=12), 13)
    assert ours == pytest.approx([0.5 * published(n) for n in range(13)])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("linear", {}, [0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0]),
        ("constant", {}, [0.5] * 7),
        ("constant_with_warmup", {}, [0.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ("cosine_with_restarts", {"num_cycles": 2}, [0.0, 0.25, 0.5, 0.25, 0.5, 0.25, 0.0]),
        ("polynomial", {"power": 2.0, "lr_end": 0.0}, [0.0, 0.25, 0.5, 0.28125, 0.125, 0.03125, 0.0]),
    ],
)
def test_other_kinds_by_name(optimizer, name, options, expected):
    scheduler = get_scheduler(optimizer, name, num_warmup_steps=2, num_training_steps=6, **options)
    assert rates(optimizer, scheduler, 7) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "cosinus", "num_training_steps": 9}, ValueError, "cosinus is not a valid"),
        ({"name": "linear"}, ValueError, "num_training_steps"),
        ({"num_warmup_steps": 10, "num_training_steps": 9}, ValueError, "must lie between 0 and"),
        ({"num_training_steps": 9, "cycles": 2}, TypeError, "cycles"),
    ],
)
def test_bad_input_is_one_clear_sentence(optimizer, arguments, error, message):
    with pytest.raises(error, match=message):
        get_scheduler(optimizer, **arguments)


def test_the_order_of_other_libraries_is_answered_with_this_one(optimizer):
    with pytest.raises(TypeError, match="takes the optimizer first, not 'linear'"):
        get_scheduler("linear", optimizer)


def test_importing_the_published_schedulers_does_not_load_transformers():
    code = "import sys, ldm.lr_scheduler; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
