import copy

import pytest
import torch
from torch import nn

from taming.modules.ema import LitEma, ema_scope


def test_the_rate_warms_up_and_the_average_follows_it():
    """Rate min(decay, (1 + n) / (10 + n)) at update n: 2/11, 3/12, …"""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = LitEma(model, decay=0.9)
    nn.init.ones_(model.weight)
    expected = 0.0
    for n in range(1, 120):
        ema(model)
        rate = min(0.9, (1 + n) / (10 + n))
        expected = rate * expected + (1 - rate)
        assert float(ema.weight) == pytest.approx(expected, abs=1e-6)
    assert int(ema.num_updates) == 119


def test_names_lose_their_dots_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    assert set(LitEma(model).state_dict()) == {"decay", "num_updates", "0weight", "0bias"}


def test_freezing_a_parameter_later_is_an_error():
    model = nn.Linear(2, 2)
    ema = LitEma(model)
    model.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="bias"):
        ema(model)


def test_the_scope_restores_the_live_weights_even_after_an_error():
    model = nn.Linear(2, 2)
    ema = LitEma(model)
    live = copy.deepcopy(model.state_dict())
    ema.weight.fill_(7.0)
    with pytest.raises(ZeroDivisionError), ema_scope(ema, model):
        assert torch.all(model.weight == 7.0)
        1 / 0  # noqa: B018
    assert all(torch.equal(live[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_a_decay_outside_zero_and_one_is_refused(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        LitEma(nn.Linear(1, 1), decay=decay)
