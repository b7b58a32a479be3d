"""The convolutional decoder of MiDaS and DPT: residual units and fusion, from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Interpolate(nn.Module):
    """Scales feature maps by a factor."""

    def __init__(self, scale_factor: float, mode: str, align_corners: bool = False) -> None:
        super().__init__()
        self.scale_factor, self.mode, self.align_corners = scale_factor, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, h · factor, w · factor)."""
        return F.interpolate(
            x, scale_factor=self.scale_factor, mode=self.mode, align_corners=self.align_corners
        )


class ResidualConvUnit_custom(nn.Module):
    """ReLU – conv, twice, added to its input; `bn` normalises after each convolution."""

    def __init__(self, features: int, bn: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1, bias=not bn)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=not bn)
        self.bn = bn
        if bn:
            self.bn1, self.bn2 = nn.BatchNorm2d(features), nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, h, w)."""
        h = self.conv1(F.relu(x))
        h = self.conv2(F.relu(self.bn1(h) if self.bn else h))
        return (self.bn2(h) if self.bn else h) + x


class FeatureFusionBlock_custom(nn.Module):
    """Joins what came from below with the features of this resolution, and doubles the size.

    Source: Ranftl et al. 2021 (DPT), figure 1, right.
    """

    def __init__(self, features: int, bn: bool = False) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        self.resConfUnit1 = ResidualConvUnit_custom(features, bn)
        self.resConfUnit2 = ResidualConvUnit_custom(features, bn)

    def forward(self, below: Tensor, features: Tensor | None = None) -> Tensor:
        """(b, c, h, w), twice or once (at the lowest resolution) → (b, c, 2h, 2w)."""
        h = below if features is None else below + self.resConfUnit1(features)
        h = F.interpolate(self.resConfUnit2(h), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(h)


def make_scratch(widths: Sequence[int], features: int, bn: bool = False) -> nn.Module:
    """What is trained from scratch: projections of four resolutions to one width, and their fusion."""
    scratch = nn.Module()
    for i, width in enumerate(widths, 1):
        scratch.add_module(f"layer{i}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
        scratch.add_module(f"refinenet{i}", FeatureFusionBlock_custom(features, bn))
    return scratch
