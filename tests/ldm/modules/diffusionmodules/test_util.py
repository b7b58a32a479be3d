import math

import numpy as np
import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules import util


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("linear", lambda s: (math.sqrt(1e-3) + s * (math.sqrt(0.05) - math.sqrt(1e-3))) ** 2),
        ("sqrt_linear", lambda s: 1e-3 + s * (0.05 - 1e-3)),
        ("sqrt", lambda s: math.sqrt(1e-3 + s * (0.05 - 1e-3))),
    ],
)
def test_schedules_have_their_closed_forms(name, formula):
    betas = util.make_beta_schedule(name, 21, linear_start=1e-3, linear_end=0.05)
    assert betas == pytest.approx([formula(i / 20) for i in range(21)]) and betas.dtype == np.float64


def test_the_cosine_schedules_product_is_a_squared_cosine():
    """Nichol & Dhariwal 2021, equation 17: ᾱ_t = f(t) / f(0)."""
    betas = util.make_beta_schedule("cosine", 100, cosine_s=8e-3)
    f = [math.cos((t / 100 + 8e-3) / 1.008 * math.pi / 2) ** 2 for t in range(101)]
    assert np.cumprod(1 - betas)[:98] == pytest.approx([v / f[0] for v in f[1:99]])
    assert betas.max() <= 0.999
    assert util.make_beta_schedule("squaredcos_cap_v2", 100)[:98] == pytest.approx(betas[:98])


def test_unknown_schedules_list_the_known_ones():
    with pytest.raises(ValueError, match="choose linear"):
        util.make_beta_schedule("quadratic", 10)
    with pytest.raises(NotImplementedError, match="'uniform' or 'quad'"):
        util.make_ddim_timesteps("linear", 10, 100)
    for n in (0, 101):
        with pytest.raises(ValueError, match="choose from 1 to 100"):
            util.make_ddim_timesteps("uniform", n, 100)


@pytest.mark.parametrize("n", [1, 3, 50, 333, 1000])
def test_uniform_steps_are_ascending_and_equally_far_apart(n):
    steps = util.make_ddim_timesteps("uniform", n, 1000)
    assert len(steps) >= n and steps[0] == 1 and set(np.diff(steps)) <= {1000 // n}


def test_ddim_parameters_follow_equation_16_of_song_et_al():
    bar = np.cumprod(1 - util.make_beta_schedule("linear", 100))
    steps = np.array([1, 40, 80])
    sigmas, alphas, before = util.make_ddim_sampling_parameters(bar, steps, eta=0.5)
    assert alphas == pytest.approx(bar[steps]) and before == pytest.approx(bar[[0, 1, 40]])
    expected = [
        0.5 * math.sqrt((1 - p) / (1 - a)) * math.sqrt(1 - a / p) for a, p in zip(alphas, before, strict=True)
    ]
    assert sigmas == pytest.approx(expected)


def test_the_time_embedding_is_cosines_then_sines():
    code = util.timestep_embedding(torch.tensor([0.0, 2.5]), 5, max_period=100)
    assert code.shape == (2, 5) and code.dtype == torch.float32
    assert torch.allclose(
        code[1], torch.tensor([math.cos(2.5), math.cos(0.25), math.sin(2.5), math.sin(0.25), 0.0])
    )
    assert util.timestep_embedding(torch.tensor([3, 4]), 2, repeat_only=True).tolist() == [[3, 3], [4, 4]]


def test_group_norm_keeps_half_types_and_computes_well_in_them():
    norm = util.normalization(64)
    x = torch.randn(2, 64, 5) * 10 + 100
    exact = norm(x)
    for dtype in (torch.bfloat16, torch.float64):
        out = norm(x.to(dtype))
        assert out.dtype == dtype and (out.float() - exact).abs().max() < 0.2
    with pytest.raises(ValueError, match="multiple of 32 channels, not 48"):
        util.normalization(48)


def test_repeated_noise_is_one_draw_and_a_generator_is_obeyed():
    repeated = util.noise_like((3, 2, 4), "cpu", repeat=True)
    assert torch.equal(repeated[0], repeated[2])
    draws = [util.noise_like((2, 2), "cpu", generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)


def test_checkpoint_functions_of_both_spellings_give_the_same_gradient():
    layer = nn.Linear(4, 4)
    grads = []
    for call in (
        lambda x: util.checkpoint(layer, (x,), layer.parameters(), True),
        lambda x: util.checkpoint(layer, (x,), layer.parameters(), False),
        lambda x: util.CheckpointFunction.apply(layer, 1, x, *layer.parameters()),
    ):
        x = torch.ones(2, 4, requires_grad=True)
        call(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[1], grads[2])


def test_layers_by_dimension():
    for dims, layer in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        assert isinstance(util.conv_nd(dims, 1, 1, 1), layer)
    with pytest.raises(ValueError, match="choose 1, 2 or 3"):
        util.avg_pool_nd(4, 2)
    assert not any(p.any() for p in util.zero_module(nn.Linear(2, 2)).parameters())
