import numpy as np
import pytest
import torch

from ldm.modules.diffusionmodules.forward_process import zero_terminal_snr
from ldm.modules.diffusionmodules.upscaling import (
    AbstractLowScaleModel,
    ImageConcatWithNoiseAugmentation,
    SimpleImageConcat,
)

SCHEDULE = {"timesteps": 100, "linear_start": 1e-4, "linear_end": 0.02}


def test_a_small_picture_is_noised_as_its_level_says():
    """Variance of √ᾱ x + √(1 - ᾱ) ε with x fixed is 1 - ᾱ."""
    model = ImageConcatWithNoiseAugmentation(SCHEDULE, max_noise_level=100)
    x = torch.zeros(2, 3, 64, 64)
    noisy, level = model(x, noise_level=torch.tensor([0, 99]))
    assert level.tolist() == [0, 99]
    betas = np.linspace(1e-4**0.5, 0.02**0.5, 100) ** 2
    assert float(noisy[0].var()) == pytest.approx(1e-4, rel=0.05)
    assert float(noisy[1].var()) == pytest.approx(1 - np.prod(1 - betas), rel=0.05)
    assert torch.equal(model.decode(noisy), noisy)


def test_levels_are_drawn_below_the_highest():
    model = ImageConcatWithNoiseAugmentation(SCHEDULE, max_noise_level=5)
    _, level = model(torch.zeros(500, 1, 1, 1))
    assert sorted(level.unique().tolist()) == [0, 1, 2, 3, 4] and level.dtype == torch.long


def test_a_level_must_be_a_tensor():
    with pytest.raises(
        AssertionError,
        match="noise_level is a int; give a tensor with a level for each picture, from 0 to 99",
    ):
        ImageConcatWithNoiseAugmentation(SCHEDULE, max_noise_level=100)(
            torch.zeros(1, 3, 4, 4), noise_level=3
        )


def test_the_plain_models_pass_the_picture_on():
    x = torch.randn(2, 3, 4, 4)
    same, level = SimpleImageConcat()(x)
    assert same is x and level.tolist() == [0, 0] and SimpleImageConcat().state_dict() == {}
    assert AbstractLowScaleModel()(x) == (x, None)


def test_all_published_schedules_are_known():
    for name in ("linear", "sqrt_linear", "sqrt", "cosine", "squaredcos_cap_v2"):
        model = AbstractLowScaleModel({"beta_schedule": name, "timesteps": 50})
        assert model.num_timesteps == 50 and (model.alphas_cumprod.diff() < 0).all()
    with pytest.raises(ValueError, match="beta_schedule='quadratic' is unknown"):
        AbstractLowScaleModel({"beta_schedule": "quadratic"})


def test_rescaling_twice_changes_nothing_more():
    once = zero_terminal_snr(np.linspace(1e-4, 0.02, 50))
    assert zero_terminal_snr(once) == pytest.approx(once, abs=1e-9)
