"""Coordinates as a condition: a map of positions, averaged and rounded to tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class CoordStage:
    """Turns a map of coordinates into tokens: averages over squares, then rounds to `n_embed` steps.

    A plain object with the interface of a first stage; it has nothing to learn.

    Args:
        n_embed: steps between 0 and 1; a coordinate of exactly 1 becomes the token `n_embed`.
        down_factor: side of the squares.

    Source: Esser et al. 2021, section 3.2 (conditioning on the position in a larger image).
    """

    def __init__(self, n_embed: int, down_factor: int) -> None:
        self.n_embed, self.down_factor = n_embed, down_factor

    def eval(self) -> CoordStage:
        """Itself."""
        return self

    def encode(self, c: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Coordinates (b, 1, h, w) in [0, 1] → steps as floats (b, 1, h', w'), None, (None, None, the same as tokens).

        Raises:
            ValueError: not one channel.
        """
        if c.ndim != 4 or c.shape[1] != 1:
            raise ValueError(f"coordinates must be (b, 1, h, w), not {tuple(c.shape)}")
        means = F.interpolate(c, scale_factor=1 / self.down_factor, mode="area")
        steps = (self.n_embed * means.clamp(0.0, 1.0)).round()
        return steps, None, (None, None, steps.long())

    def decode(self, c: Tensor) -> Tensor:
        """Steps (b, 1, h', w') → coordinates (b, 1, h, w) in [0, 1]."""
        return F.interpolate(c / self.n_embed, scale_factor=self.down_factor, mode="nearest")
