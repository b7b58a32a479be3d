"""Weights of the denoising error at noise level σ, of σ's shape."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class DiffusionLossWeighting(ABC):
    """A weight for each noise level; a subclass defines the call."""

    @abstractmethod
    def __call__(self, sigma: Tensor) -> Tensor:
        """λ(σ), of σ's shape."""


class UnitWeighting(DiffusionLossWeighting):
    """1: the error of x_0 itself."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """See `DiffusionLossWeighting`."""
        return torch.ones_like(sigma)


class EDMWeighting(DiffusionLossWeighting):
    """1 / c_out² of `EDMScaling`: the network's own error counts the same at every level (Karras et al. 2022, table 1).

    Args:
        sigma_data: standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Tensor:
        """See `DiffusionLossWeighting`."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VWeighting(EDMWeighting):
    """1 / c_out² of `VScaling`: the error of v."""

    def __init__(self) -> None:
        super().__init__(sigma_data=1.0)


class EpsWeighting(DiffusionLossWeighting):
    """σ⁻²: the error of ε."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """See `DiffusionLossWeighting`."""
        return sigma**-2.0
