"""What shapes the latents: each regularizer is called with z and returns `(z, log)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from sgm.modules.autoencoding.regularizers.base import AbstractRegularizer

__all__ = ["AbstractRegularizer", "DiagonalGaussianDistribution", "DiagonalGaussianRegularizer"]


class DiagonalGaussianRegularizer(AbstractRegularizer):
    """Mean and log-variance → a draw from that Gaussian, and its divergence from the standard normal one.

    Args:
        sample: draw; False takes the mean.

    Source: Kingma & Welling 2014, equation 10.
    """

    def __init__(self, sample: bool = True) -> None:
        super().__init__()
        self.sample = sample

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """None."""
        return iter(())

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(b, 2c, h, w) → (b, c, h, w), and `kl_loss`, the sum over a latent, averaged over the batch."""
        posterior = DiagonalGaussianDistribution(z)
        latent = posterior.sample() if self.sample else posterior.mode()
        return latent, {"kl_loss": posterior.kl().sum() / len(z)}
