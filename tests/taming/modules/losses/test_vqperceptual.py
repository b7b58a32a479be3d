import math

import pytest
import torch
from torch import nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator, ReconstructionWithKL
from taming.modules.losses.vqperceptual import VQLPIPSWithDiscriminator, measure_perplexity

SMALL = {"disc_num_layers": 1, "disc_in_channels": 3, "perceptual_weight": 0.0}


@pytest.fixture
def vq_loss(random_vgg):
    return VQLPIPSWithDiscriminator(disc_start=10, disc_ndf=8, codebook_weight=0.5, **SMALL)


def test_the_generator_pays_the_mean_pixel_distance_and_the_weighted_codebook_loss_before_the_start(vq_loss):
    last = nn.Conv2d(3, 3, 1)
    x = torch.rand(2, 3, 32, 32)
    out = last(x)
    value, log = vq_loss(torch.tensor(0.4), x, out, 0, 9, last_layer=last.weight)
    assert float(value) == pytest.approx(float((x - out).abs().mean()) + 0.2, rel=1e-5)
    assert float(log["train/disc_factor"]) == 0.0


def test_the_adaptive_weight_makes_both_losses_pull_equally_at_the_last_layer(vq_loss):
    """Equation 7 of Esser et al. 2021: λ = |∇ reconstruction| / (|∇ adversarial| + δ)."""
    last = nn.Conv2d(3, 3, 1)
    x = torch.rand(2, 3, 32, 32)
    _, log = vq_loss(torch.tensor(0.0), x, last(x), 0, 10, last_layer=last.weight)
    nll = (x - last(x)).abs().mean()
    g = -vq_loss.discriminator(last(x)).mean()
    pulls = [torch.autograd.grad(loss, last.weight)[0].norm() for loss in (nll, g)]
    assert float(log["train/d_weight"]) == pytest.approx(float(pulls[0] / (pulls[1] + 1e-4)), rel=1e-4)
    assert float(log["train/disc_factor"]) == 1.0


def test_the_discriminators_gradient_never_reaches_the_autoencoder(vq_loss):
    last = nn.Conv2d(3, 3, 1)
    x = torch.rand(2, 3, 32, 32)
    loss, log = vq_loss(torch.tensor(0.0), x, last(x), 1, 10, last_layer=last.weight)
    loss.backward()
    assert last.weight.grad is None
    assert sorted(log) == ["train/disc_loss", "train/logits_fake", "train/logits_real"]


def test_perplexity_of_evenly_used_codes_is_their_number():
    perplexity, used = measure_perplexity(torch.arange(8).repeat(5), 16)
    assert float(perplexity) == pytest.approx(8.0, rel=1e-5) and int(used) == 8


def test_kl_loss_sums_over_an_image_and_divides_by_the_likelihoods_spread(random_vgg):
    loss = LPIPSWithDiscriminator(disc_start=1000, logvar_init=0.5, kl_weight=0.1, disc_factor=0.0, **SMALL)
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    posterior = DiagonalGaussianDistribution(torch.randn(2, 4, 2, 2))
    value, log = loss(x, y, posterior, 0, 0, last_layer=None)
    nll = ((x - y).abs() / math.exp(0.5) + 0.5).sum() / 2
    kl = posterior.kl().mean()
    assert float(value) == pytest.approx(float(nll + 0.1 * kl), rel=1e-5)
    assert float(log["train/d_weight"]) == 0.0  # disc_factor 0 asks for no gradients


def test_the_plain_loss_is_the_mean_of_absolute_and_squared_differences_plus_kl_per_number():
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    posterior = DiagonalGaussianDistribution(torch.randn(2, 4, 2, 2))
    value, _ = ReconstructionWithKL(kl_weight=0.3, l1_weight=1.0, l2_weight=2.0)(x, y, posterior)
    expected = (x - y).abs().mean() + 2 * (x - y).pow(2).mean() + 0.3 * posterior.kl().mean() / 8
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_unknown_losses_are_named(random_vgg):
    with pytest.raises(AssertionError, match="Did you mean 'hinge'"):
        VQLPIPSWithDiscriminator(disc_start=0, disc_loss="hinges", **SMALL)
    with pytest.raises(AssertionError, match="if and only if disc_conditional"):
        loss = VQLPIPSWithDiscriminator(disc_start=0, disc_ndf=8, **SMALL)
        loss(None, torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32), 0, 0, cond=torch.rand(1, 1, 32, 32))
