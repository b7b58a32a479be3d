"""The distributions that autoencoders put their latents in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class AbstractDistribution:
    """Something to sample from, with a most likely value."""

    def sample(self) -> Tensor:
        """A draw."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        """The most likely value."""
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    """All mass on one value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        """The value."""
        return self.value

    def mode(self) -> Tensor:
        """The value."""
        return self.value


class DiagonalGaussianDistribution:
    """A Gaussian with diagonal covariance, given by mean and log-variance.

    Args:
        parameters: mean and log-variance concatenated along the channels, (b, 2c, …); the log-variance is clamped to [-30, 20].
        deterministic: no variance: samples are the mean.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = torch.clamp(logvar, -30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)
        if deterministic:
            self.var = self.std = torch.zeros_like(self.mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw, (b, c, …). The noise comes from the CPU's generator: the same seed gives the same latent on every device."""
        device = generator.device if generator is not None else "cpu"
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * noise.to(device=self.parameters.device)

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence to another such Gaussian or to N(0, 1), summed over all axes but the batch's, (b,)."""
        if self.deterministic:
            return torch.tensor([0.0])
        if other is None:
            terms = self.mean.pow(2) + self.var - 1.0 - self.logvar
        else:
            terms = (
                (self.mean - other.mean).pow(2) / other.var
                + self.var / other.var
                - 1.0
                - self.logvar
                + other.logvar
            )
        return 0.5 * terms.sum(dim=[1, 2, 3])

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of a sample, summed over `dims`."""
        if self.deterministic:
            return torch.tensor([0.0])
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).pow(2) / self.var
        return 0.5 * terms.sum(dim=list(dims))

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean


def likeliest(encoded: Any) -> Any:
    """The mode of a first stage's Gaussian; latents of another kind of first stage as they are."""
    return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """KL divergence between Gaussians, element by element, in nats; numbers broadcast against tensors.

    Raises:
        ValueError: not one of the four is a tensor.
    """
    like = next((x for x in (mean1, logvar1, mean2, logvar2) if isinstance(x, Tensor)), None)
    if like is None:
        raise ValueError("at least one argument must be a tensor")
    logvar1, logvar2 = (x if isinstance(x, Tensor) else torch.tensor(x).to(like) for x in (logvar1, logvar2))
    return 0.5 * (
        logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    )
