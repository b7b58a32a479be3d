"""Scalings against the algebra they stand for, and rounding to a table of noise levels."""

import pytest
import torch

from sgm.modules.diffusionmodules import denoiser_scaling, denoiser_weighting, loss_weighting
from sgm.modules.diffusionmodules.denoiser import Denoiser, DiscreteDenoiser
from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling, EDMSampling, ZeroSampler

BASE = "sgm.modules.diffusionmodules."
LEGACY = {"target": BASE + "discretizer.LegacyDDPMDiscretization"}
SIGMA = torch.tensor([0.05, 1.0, 14.0])


def scaling(name, **params):
    return {"target": f"{BASE}denoiser_scaling.{name}", "params": params}


def discrete(name="EpsScaling", **params):
    return DiscreteDenoiser(scaling(name), 1000, LEGACY, **params)


# what a perfect network says, of (x_0, ε, σ)
PERFECT = {
    "EpsScaling": lambda x, eps, s: eps,
    "VScaling": lambda x, eps, s: (eps - s * x) / (1 + s**2).sqrt(),
    "VScalingWithEDMcNoise": lambda x, eps, s: (eps - s * x) / (1 + s**2).sqrt(),
    "StartScaling": lambda x, eps, s: x,
    "FlowScaling": lambda x, eps, s: eps - x,
    "EDMScaling": lambda x, eps, s: (s * x - 0.25 * eps) / (0.5 * (s**2 + 0.25).sqrt()),
}


@pytest.mark.parametrize("name", PERFECT)
def test_a_perfect_network_gives_the_image_back(name):
    x, eps, s = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), SIGMA.reshape(-1, 1, 1, 1)
    out = Denoiser(scaling(name))(lambda *_: PERFECT[name](x, eps, s), x + s * eps, SIGMA, {})
    assert torch.allclose(out, x, atol=2e-5)


@pytest.mark.parametrize("name", PERFECT)
def test_the_network_sees_what_it_was_trained_on(name):
    x, eps, s = torch.randn(3, 2, 64, 64), torch.randn(3, 2, 64, 64), SIGMA.reshape(-1, 1, 1, 1)
    if name == "EDMScaling":
        x = 0.5 * x
    seen = []
    Denoiser(scaling(name))(lambda z, *_: (seen.append(z), z)[1], x + s * eps, SIGMA, {})
    if name == "FlowScaling":
        assert torch.allclose(seen[0], (x + s * eps) / (1 + s))  # (1 - τ) x_0 + τ ε
    else:
        assert torch.allclose(seen[0].flatten(1).std(dim=1), torch.ones(3), atol=0.05)


def test_the_network_is_asked_in_the_inputs_precision_and_scaled_in_that_of_sigma():
    seen = []
    x = torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    out = Denoiser(scaling("VScaling"))(
        lambda z, *_: (seen.append(z.dtype), z)[1], x, torch.tensor([700.0]), {}
    )
    assert seen == [torch.bfloat16] and out.dtype == torch.float32 and torch.isfinite(out).all()


def test_conditions_and_further_inputs_reach_the_network():
    seen = {}

    def network(z, noise, cond, **more):
        seen.update(cond=cond, noise=noise.shape, **more)
        return z

    Denoiser(scaling("EDMScaling"))(
        network, torch.ones(2, 3, 4, 4), torch.ones(2), {"a": 1}, num_video_frames=2
    )
    assert seen == {"cond": {"a": 1}, "noise": (2,), "num_video_frames": 2}


def test_noise_levels_are_rounded_to_the_table_and_labels_are_its_steps():
    d, seen = discrete(), []
    assert d.sigma_to_idx(torch.tensor([0.0, 99.0])).tolist() == [0, 999]  # beyond the ends
    assert torch.equal(d.sigma_to_idx(d.sigmas), torch.arange(1000))
    between = 0.4 * d.sigmas[500] + 0.6 * d.sigmas[501]
    d(lambda z, label, c: (seen.append(label), z)[1], torch.ones(1, 1, 2, 2), between[None], {})
    assert seen[0].tolist() == [501] and seen[0].dtype == torch.int64
    assert d.sigma_to_idx(torch.ones(2, 3, 1)).shape == (2, 3, 1)


def test_the_label_of_another_scaling_is_taken_for_a_noise_level_as_published():
    d, seen = discrete("EDMScaling"), []
    sigma = d.sigmas[[900]]
    d(lambda z, label, c: (seen.append(label), z)[1], torch.ones(1, 1, 2, 2), sigma, {})
    assert seen[0].tolist() == d.sigma_to_idx(0.25 * sigma.log()).tolist()


def test_labels_are_left_alone_without_quantisation():
    seen = []
    d = discrete(quantize_c_noise=False)
    d(lambda z, label, c: (seen.append(label), z)[1], torch.ones(1, 1, 2, 2), d.sigmas[[7]], {})
    assert torch.equal(seen[0], d.sigmas[[7]])


def test_checkpoints_hold_the_table_of_a_discrete_denoiser_only():
    assert {k: v.shape for k, v in discrete().state_dict().items()} == {"sigmas": (1000,)}
    assert not Denoiser(scaling("EpsScaling")).state_dict()


def test_older_configurations_may_name_a_weighting():
    weighting = {"target": BASE + "denoiser_weighting.EpsWeighting"}
    assert not Denoiser(scaling("EpsScaling"), weighting_config=weighting).state_dict()
    assert discrete(weighting_config=weighting).num_idx == 1000


def test_a_model_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        assert discrete().sigmas.shape == (1000,)


@pytest.mark.parametrize(
    ("weight", "row"),
    [("EDMWeighting", "EDMScaling"), ("VWeighting", "VScaling"), ("EpsWeighting", "EpsScaling")],
)
def test_weights_undo_the_scaling_of_the_networks_error(weight, row):
    _, c_out, _, _ = getattr(denoiser_scaling, row)()(SIGMA)
    assert torch.allclose(getattr(loss_weighting, weight)()(SIGMA), c_out**-2)
    assert getattr(denoiser_weighting, weight) is getattr(loss_weighting, weight)


def test_unit_weights_are_ones():
    assert torch.equal(loss_weighting.UnitWeighting()(SIGMA), torch.ones(3))


def test_training_noise_levels_are_log_normal():
    drawn = EDMSampling(p_mean=0.7, p_std=1.6)(20000).log()
    assert float(drawn.mean()) == pytest.approx(0.7, abs=0.05) and float(drawn.std()) == pytest.approx(
        1.6, abs=0.05
    )


@pytest.mark.parametrize(
    ("sampler", "given"),
    [
        (EDMSampling(), torch.zeros(3)),
        (DiscreteSampling(LEGACY, 1000), torch.tensor([0, 5, 999])),
        (ZeroSampler(), torch.zeros(3)),
    ],
)
def test_numbers_are_drawn_even_where_they_are_given(sampler, given):
    torch.manual_seed(1)
    sampler(3)
    after_drawing = torch.rand(1)
    torch.manual_seed(1)
    sampler(3, rand=given)
    assert torch.equal(torch.rand(1), after_drawing)


def test_discrete_and_zero_levels():
    legacy = DiscreteSampling(LEGACY, 1000)
    assert torch.equal(legacy(2, torch.tensor([0, 999])), legacy.sigmas[[0, 999]])
    assert set(legacy(50).tolist()) <= set(legacy.sigmas.tolist())
    assert ZeroSampler()(2).tolist() == pytest.approx([1e-5, 1e-5])
