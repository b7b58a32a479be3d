"""The denoising loss against what its parts say."""

import pytest
import torch

from sgm.modules.diffusionmodules.denoiser import Denoiser
from sgm.modules.diffusionmodules.loss import StandardDiffusionLoss

BASE = "sgm.modules.diffusionmodules."
X = torch.randn(3, 2, 4, 4)


def make(weighting="UnitWeighting", **options):
    return StandardDiffusionLoss(
        {"target": BASE + "sigma_sampling.EDMSampling"},
        {"target": f"{BASE}loss_weighting.{weighting}"},
        **options,
    )


def denoiser(scaling="StartScaling"):
    return Denoiser({"target": f"{BASE}denoiser_scaling.{scaling}"})


def no_condition(batch):
    return {}


def test_a_perfect_denoiser_has_no_loss():
    for kind in ("l1", "l2"):
        loss = make("EDMWeighting", loss_type=kind)(lambda *a: X, denoiser(), no_condition, X, {})
        assert loss.shape == (3,) and float(loss.abs().max()) < 1e-10


@pytest.mark.parametrize(("kind", "expected"), [("l2", 4.0), ("l1", 2.0)])
def test_the_loss_is_the_weighted_mean_error_of_each_sample(kind, expected):
    loss = make(loss_type=kind)
    weight = torch.tensor([1.0, 2.0, 3.0]).reshape(-1, 1, 1, 1)
    assert loss.get_loss(X + 2, X, weight).tolist() == pytest.approx(
        [expected, 2 * expected, 3 * expected], rel=1e-5
    )


def test_the_eps_weighted_loss_is_the_error_of_the_noise():
    """Predicting 0 for ε leaves ε² (Ho et al. 2020, equation 14)."""
    torch.manual_seed(3)
    loss = make("EpsWeighting")(lambda z, *a: 0 * z, denoiser("EpsScaling"), no_condition, X, {})
    torch.manual_seed(3)
    torch.randn(3)  # noise levels come first
    assert torch.allclose(loss, torch.randn_like(X).square().flatten(1).mean(dim=1), rtol=1e-4)


def test_random_numbers_are_drawn_in_the_published_order():
    drawn = []

    def conditioner(batch):
        drawn.append(torch.rand(1))
        return {}

    torch.manual_seed(3)
    seen = []
    make(offset_noise_level=0.1)(lambda z, *a: (seen.append(z), z)[1], denoiser(), conditioner, X, {})
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn[0])
    sigma = (-1.2 + 1.2 * torch.randn(3)).exp().reshape(-1, 1, 1, 1)
    noise = torch.randn_like(X) + 0.1 * torch.randn(3, 2)[..., None, None]
    assert torch.allclose(seen[0], (X + sigma * noise) / (1 + sigma**2).sqrt(), atol=1e-5)


def test_offset_noise_of_videos_is_that_of_a_frame():
    video = torch.zeros(2, 3, 5, 4, 4)
    loss = make(offset_noise_level=1.0)
    torch.manual_seed(1)
    plain = torch.randn_like(video)
    torch.manual_seed(1)
    offset = loss.get_noise(video) - plain
    assert torch.allclose(offset, offset[:, :1, :, :1, :1].expand_as(offset), atol=1e-6)
    assert len(offset[:, 0, :, 0, 0].flatten().unique()) == 10


@pytest.mark.parametrize(
    ("keys", "reached"), [(None, {}), ("frames", {"frames": 2}), (["frames", "absent"], {"frames": 2})]
)
def test_entries_of_the_batch_reach_the_network(keys, reached):
    seen = []

    def network(z, noise, cond, **more):
        seen.append((cond, more))
        return z

    make(batch2model_keys=keys)(
        network, denoiser(), lambda batch: {"a": batch["frames"]}, X, {"frames": 2, "other": 1}
    )
    assert seen == [({"a": 2}, reached)]


def test_the_perceptual_loss_compares_pictures(random_vgg):
    loss = make(loss_type="lpips")
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    value = loss.get_loss(pictures, pictures, torch.full((2, 1, 1, 1), 9.0))
    assert value.shape == (2,) and float(value.abs().max()) < 1e-6
    assert (loss.get_loss(-pictures, pictures, torch.ones(2, 1, 1, 1)) > 0).all()
    assert not any(p.requires_grad for p in loss.parameters())


def test_unknown_losses_are_named():
    with pytest.raises(ValueError, match="loss_type='huber' is unknown"):
        make(loss_type="huber")
