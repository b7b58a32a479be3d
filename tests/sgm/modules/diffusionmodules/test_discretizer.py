"""Noise levels against closed forms, published tables and diffusers."""

import numpy as np
import pytest
import torch

from sgm.modules.diffusionmodules.discretizer import (
    ALIGN_YOUR_STEPS,
    AlignYourStepsDiscretization,
    EDMDiscretization,
    ExponentialDiscretization,
    KarrasDiscretization,
    LegacyDDPMDiscretization,
    TableDiscretization,
    generate_roughly_equally_spaced_steps,
)

ALL = [
    EDMDiscretization(), KarrasDiscretization(), ExponentialDiscretization(), AlignYourStepsDiscretization(),
    LegacyDDPMDiscretization(), TableDiscretization(torch.linspace(0.1, 3, 40)),
]  # fmt: skip


@pytest.mark.parametrize("discretization", ALL)
@pytest.mark.parametrize("n", [1, 2, 10, 33])
def test_every_discretization_descends_to_zero(discretization, n):
    sigmas = discretization(n)
    assert sigmas.shape == (n + 1,) and sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0
    assert torch.equal(discretization(n, flip=True), sigmas.flip(0))
    assert torch.equal(discretization(n, do_append_zero=False), sigmas[:-1])


@pytest.mark.parametrize("discretization", ALL)
def test_impossible_numbers_of_levels_are_refused(discretization):
    with pytest.raises(ValueError, match="0 noise levels"):
        discretization(0)


def test_edm_runs_evenly_in_the_seventh_root():
    sigmas = EDMDiscretization()(18, do_append_zero=False).double()
    assert float(sigmas[0]) == pytest.approx(80) and float(sigmas[-1]) == pytest.approx(0.002)
    steps = (sigmas ** (1 / 7)).diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-4)


def test_exponential_runs_evenly_in_the_logarithm():
    sigmas = ExponentialDiscretization(0.1, 100.0)(4, do_append_zero=False)
    assert sigmas.tolist() == pytest.approx([100.0, 10.0, 1.0, 0.1])


def test_legacy_levels_are_those_of_stable_diffusion():
    everything = LegacyDDPMDiscretization()(1000, do_append_zero=False)
    assert float(everything[0]) == pytest.approx(14.6146, abs=1e-4)  # the published ends
    assert float(everything[-1]) == pytest.approx(0.0292, abs=1e-4)
    few = LegacyDDPMDiscretization()(4, do_append_zero=False)
    assert torch.equal(few, everything.flip(0)[[999, 749, 499, 249]])


def test_more_steps_than_were_trained_are_refused():
    with pytest.raises(ValueError, match="choose from 1 to 1000"):
        LegacyDDPMDiscretization()(1001)


def test_steps_are_truncated_and_hold_the_last():
    assert generate_roughly_equally_spaced_steps(3, 10).tolist() == [3, 6, 9]


def test_karras_levels_are_those_of_diffusers():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(20)
    low, high = float(scheduler.sigmas[-2]), float(scheduler.sigmas[0])
    assert torch.allclose(KarrasDiscretization(low, high)(20), scheduler.sigmas, rtol=1e-5)
    # the defaults are that range, of the whole schedule
    assert KarrasDiscretization()(2)[:2].tolist() == pytest.approx([14.6146, 0.0292], rel=1e-3)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("sd15", "StableDiffusionSigmas"),
        ("sdxl", "StableDiffusionXLSigmas"),
        ("svd", "StableDiffusionVideoSigmas"),
    ],
)
def test_aligned_steps_are_the_published_tables(model, name):
    from diffusers.schedulers import AysSchedules

    assert AlignYourStepsDiscretization(model)(10).tolist() == pytest.approx(AysSchedules[name])


def test_aligned_steps_are_interpolated_in_the_logarithm():
    table = ALIGN_YOUR_STEPS["sdxl"]
    sigmas = AlignYourStepsDiscretization("sdxl")(20).tolist()
    assert sigmas[:20:2] == pytest.approx(table[:10], rel=1e-5)
    assert sigmas[1:20:2] == pytest.approx(np.sqrt(np.multiply(table[:-1], table[1:])), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDMDiscretization(sigma_min=3, sigma_max=1), "sigma_min=3, sigma_max=1"),
        (lambda: ExponentialDiscretization(sigma_min=0), "sigma_min=0"),
        (lambda: AlignYourStepsDiscretization("sd3"), "choose one of"),
    ],
)
def test_wrong_ranges_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_levels_are_real_numbers_while_a_model_is_built_on_the_meta_device():
    with torch.device("meta"):
        built = [
            d(3, device="cpu")
            for d in (EDMDiscretization(), LegacyDDPMDiscretization(), ExponentialDiscretization())
        ]
    assert not any(sigmas.is_meta for sigmas in built)
