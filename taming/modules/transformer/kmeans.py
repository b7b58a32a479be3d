"""Colours by clustering: the tokens of image GPT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from taming.modules.vqvae.quantize import nearest_codes


class KMeans(nn.Module):
    """Replaces each pixel by the nearest of `ncluster` centres.

    Args:
        ncluster: number of centres.
        nc: channels of a pixel.
        niter: rounds of Lloyd's algorithm in `initialize`.

    Source: Chen et al. 2020 (image GPT), section 3.1.
    """

    C: Tensor
    initialized: Tensor

    def __init__(self, ncluster: int = 512, nc: int = 3, niter: int = 10) -> None:
        super().__init__()
        self.ncluster, self.nc, self.niter = ncluster, nc, niter
        self.shape = (3, 32, 32)
        self.register_buffer("C", torch.zeros(ncluster, nc))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def is_initialized(self) -> bool:
        """Whether `initialize` has run."""
        return self.initialized.item() == 1

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Find the centres of points.

        Args:
            x: (n, nc), with n at least `ncluster`.

        Raises:
            ValueError: too few points or other channels.
        """
        n, channels = x.shape
        if n < self.ncluster or channels != self.nc:
            raise ValueError(
                f"{self.ncluster} centres of {self.nc} channels need as many points, got {n} of {channels}"
            )
        centres = x[torch.randperm(n, device=x.device)[: self.ncluster]]
        for _ in range(self.niter):
            nearest = nearest_codes(x, centres)
            counts = torch.bincount(nearest, minlength=self.ncluster)
            sums = torch.zeros_like(centres).index_add_(0, nearest, x)
            centres = sums / counts.clamp(min=1)[:, None].to(x)
            dead = counts == 0  # a centre without points starts again at a random one
            centres[dead] = x[torch.randperm(n, device=x.device)[: int(dead.sum())]]
        self.C.copy_(centres)
        self.initialized.fill_(1)

    def forward(self, x: Tensor, reverse: bool = False, shape: Sequence[int] | None = None) -> Tensor:
        """Images to tokens, or back.

        Args:
            x: images (b, nc, h, w); tokens (b, h * w) if `reverse`.
            reverse: from tokens to images.
            shape: (nc, h, w) of the images to make; (3, 32, 32) unless given.

        Returns:
            Tokens (b, h * w), or images (b, nc, h, w).
        """
        if not reverse:
            points = rearrange(x, "b c h w -> (b h w) c")
            return nearest_codes(points, self.C).reshape(x.shape[0], -1)
        _, height, width = shape or self.shape
        return rearrange(self.C[x], "b (h w) c -> b c h w", h=height, w=width).contiguous()
