"""Remembers what the first stage made of each training picture, so that it runs once a picture and not once an epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class LatentCache:
    """Encodings by picture, kept on the CPU.

    Of a Gaussian posterior its parameters are kept, so that each epoch still draws anew from the exact posterior.
    A picture's key must name its exact pixels, augmentation included.
    """

    def __init__(self) -> None:
        self.entries: dict[int, Tensor] = {}
        self.gaussian = False

    def __len__(self) -> int:
        return len(self.entries)

    def encode(self, x: Tensor, keys: Tensor, encode: Callable[[Tensor], Any]) -> Any:
        """Encodings of a batch; only pictures not seen before go through `encode`.

        Args:
            x: images (b, c, h, w).
            keys: a whole number for each picture, (b,).
            encode: images → a Gaussian posterior or a tensor.

        Returns:
            What `encode` gives for the batch.
        """
        names = keys.tolist()
        fresh = [i for i, name in enumerate(names) if name not in self.entries]
        if fresh:
            made = encode(x[fresh])
            self.gaussian = isinstance(made, DiagonalGaussianDistribution)
            for i, entry in zip(
                fresh, (made.parameters if self.gaussian else made).detach().cpu(), strict=True
            ):
                self.entries[names[i]] = entry.clone()
        stacked = torch.stack([self.entries[name] for name in names]).to(x.device, non_blocking=True)
        return DiagonalGaussianDistribution(stacked) if self.gaussian else stacked
