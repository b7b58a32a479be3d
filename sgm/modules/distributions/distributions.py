"""Latent distributions; implemented in `ldm.modules.distributions.distributions`, importable here for existing code."""

from ldm.modules.distributions.distributions import (
    AbstractDistribution,
    DiagonalGaussianDistribution,
    DiracDistribution,
    normal_kl,
)

__all__ = ["AbstractDistribution", "DiagonalGaussianDistribution", "DiracDistribution", "normal_kl"]
