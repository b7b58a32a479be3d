"""The interface of what shapes latents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from taming.modules.losses.vqperceptual import measure_perplexity

__all__ = ["AbstractRegularizer", "IdentityRegularizer", "measure_perplexity"]


class AbstractRegularizer(nn.Module):
    """Shapes latents: called with z, it returns the new z and a dict of losses and figures to log."""

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Latents (b, c, …) → latents, and what a loss may weigh or a logger show."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(z) -> (z, log)")

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What the autoencoder's optimizer trains of it."""
        raise NotImplementedError(f"{type(self).__name__} must define get_trainable_parameters()")


class IdentityRegularizer(AbstractRegularizer):
    """Latents as they are."""

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """z itself, and nothing to log."""
        return z, {}

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """None."""
        return iter(())
