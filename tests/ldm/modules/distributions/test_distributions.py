import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, DiracDistribution, normal_kl
from sgm.modules.distributions.distributions import DiagonalGaussianDistribution as Alias


def pair():
    one, other = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    return DiagonalGaussianDistribution(one), DiagonalGaussianDistribution(other)


def test_divergence_and_likelihood_equal_torch_distributions():
    one, other = pair()
    p, q = (Normal(d.mean, d.std) for d in (one, other))
    assert torch.allclose(one.kl(other), kl_divergence(p, q).sum((1, 2, 3)), rtol=1e-4)
    assert torch.allclose(one.kl(), kl_divergence(p, Normal(0.0, 1.0)).sum((1, 2, 3)), rtol=1e-4)
    x = torch.randn(2, 4, 3, 3)
    assert torch.allclose(one.nll(x), -p.log_prob(x).sum((1, 2, 3)), rtol=1e-4)
    elementwise = normal_kl(one.mean, one.logvar, other.mean, other.logvar)
    assert torch.allclose(elementwise, kl_divergence(p, q), rtol=1e-4, atol=1e-6)


def test_the_log_variance_is_clamped():
    d = DiagonalGaussianDistribution(
        torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[[[99.0, -99.0]]]])], dim=1)
    )
    assert d.logvar.flatten().tolist() == [20.0, -30.0]


def test_samples_come_from_the_cpus_generator_or_a_given_one():
    d, _ = pair()
    torch.manual_seed(4)
    noise = torch.randn(d.mean.shape)
    torch.manual_seed(4)
    assert torch.equal(d.sample(), d.mean + d.std * noise)
    a, b = (d.sample(generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)


def test_a_deterministic_one_is_its_mean():
    d = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3), deterministic=True)
    assert torch.equal(d.sample(), d.mode()) and d.kl().item() == 0.0 and not d.std.any()
    assert DiracDistribution(3).sample() == DiracDistribution(3).mode() == 3


def test_divergence_needs_a_tensor():
    with pytest.raises(ValueError, match="must be a tensor"):
        normal_kl(0.0, 0.0, 1.0, 1.0)


def test_the_later_path_is_the_same_class():
    assert Alias is DiagonalGaussianDistribution
