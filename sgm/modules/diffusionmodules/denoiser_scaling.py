"""How a network's input and output are scaled so that it denoises at any noise level.

denoised = c_skip · x + c_out · network(c_in · x, c_noise), for x = x_0 + σ ε. All functions take σ of any shape and give c_skip,
c_out, c_in and c_noise of the same shape.

Source: Karras et al. 2022, equation 7 and table 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

Scalings = tuple[Tensor, Tensor, Tensor, Tensor]


class DenoiserScaling(ABC):
    """A row of the table; a subclass defines the call."""

    @abstractmethod
    def __call__(self, sigma: Tensor) -> Scalings:
        """c_skip, c_out, c_in and c_noise at σ."""


class EDMScaling(DenoiserScaling):
    """Input and target of unit variance at every noise level.

    Args:
        sigma_data: standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Scalings:
        """See `DenoiserScaling`."""
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        return c_skip, c_out, variance.rsqrt(), 0.25 * sigma.log()


class EpsScaling(DenoiserScaling):
    """The network predicts ε from x at unit variance; it is told σ, which a discrete denoiser turns into a step."""

    def __call__(self, sigma: Tensor) -> Scalings:
        """See `DenoiserScaling`."""
        return torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), sigma.clone()


class VScaling(DenoiserScaling):
    """The network predicts v = √ᾱ ε - √(1 - ᾱ) x_0 (Salimans & Ho 2022) from x at unit variance; it is told σ."""

    def __call__(self, sigma: Tensor) -> Scalings:
        """See `DenoiserScaling`."""
        c_in = (sigma**2 + 1).rsqrt()
        return 1 / (sigma**2 + 1), -sigma * c_in, c_in, sigma.clone()


class VScalingWithEDMcNoise(VScaling):
    """The network predicts v and is told ¼ ln σ."""

    def __call__(self, sigma: Tensor) -> Scalings:
        """See `DenoiserScaling`."""
        c_skip, c_out, c_in, _ = super().__call__(sigma)
        return c_skip, c_out, c_in, 0.25 * sigma.log()


class StartScaling(DenoiserScaling):
    """The network predicts x_0 from x at unit variance; it is told σ."""

    def __call__(self, sigma: Tensor) -> Scalings:
        """See `DenoiserScaling`."""
        return torch.zeros_like(sigma), torch.ones_like(sigma), (sigma**2 + 1).rsqrt(), sigma.clone()


class FlowScaling(DenoiserScaling):
    """The network predicts ε - x_0 from (1 - τ) x_0 + τ ε, a rectified flow, with σ = τ / (1 - τ); it is told σ."""

    def __call__(self, sigma: Tensor) -> Scalings:
        """See `DenoiserScaling`."""
        signal = 1 / (sigma + 1)  # 1 - τ
        return signal, -sigma * signal, signal, sigma.clone()
