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


def test_weights_without_averages_are_drawn_with_as_they_are_and_the_average_begins_with_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.model_ema = LitEma(self.net)

    model, pruned = Model(), nn.Linear(2, 2).state_dict()
    model.load_state_dict({f"net.{name}": value for name, value in pruned.items()}, strict=False)
    with ema_scope(model.model_ema, model.net):
        assert torch.equal(model.net.weight, pruned["weight"])
    model.model_ema(model.net)
    assert torch.equal(model.model_ema.weight, pruned["weight"])


def test_weights_loaded_later_without_averages_do_not_void_those_that_are_there():
    net = nn.Linear(2, 2)
    ema = LitEma(net)
    averages = {name: torch.full_like(value, 3) for name, value in ema.state_dict().items()}
    ema.load_state_dict(averages)
    ema.load_state_dict({}, strict=False)
    with ema_scope(ema, net):
        assert torch.all(net.weight == 3.0)
