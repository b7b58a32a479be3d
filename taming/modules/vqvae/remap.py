"""Renumbering of code indices to those that a data set really uses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class Remap(nn.Module):
    """Renumbers code indices to the codes that a data set really uses.

    Args:
        n_e: size of the codebook.
        remap: path of an `.npy` file with the used indices; None keeps the numbering.
        unknown_index: what other codes become: "random" (any used one), "extra" (one more index) or a number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file names codes that the codebook lacks.
    """

    used: Tensor

    def __init__(self, n_e: int, remap: str | None, unknown_index: str | int) -> None:
        super().__init__()
        self.remap = remap
        self.unknown_index = unknown_index
        self.re_embed = n_e
        self.accepts_more = False  # indices beyond the used ones stand for "none of them"
        if remap is not None:
            used = np.load(remap).astype(np.int64).reshape(-1)
            if not used.size or used.min() < 0 or used.max() >= n_e:
                raise ValueError(
                    f"{remap} must list used codes out of 0 to {n_e - 1}; "
                    + (f"it holds {used.min()} to {used.max()}" if used.size else "it is empty")
                )
            self.register_buffer("used", torch.from_numpy(used))
            self.re_embed = len(used)
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1
                self.accepts_more = True

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Codebook indices (b, …) → positions among the used ones (the first, where one is listed twice), same shape."""
        self._demand_batch(inds)
        sorted_used, order = self.used.to(inds).sort(stable=True)
        place = torch.searchsorted(sorted_used, inds.contiguous()).clamp(max=len(order) - 1)
        position = order[place]
        unknown = sorted_used[place] != inds
        if self.unknown_index == "random":
            # on the CPU, as published, so that a seed gives the same indices on every device
            position[unknown] = torch.randint(0, self.re_embed, size=position[unknown].shape).to(position)
        else:
            position[unknown] = int(self.unknown_index)
        return position

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Positions among the used codes (b, …) → codebook indices, same shape; the extra index becomes the first code."""
        self._demand_batch(inds)
        used = self.used.to(inds)
        if self.accepts_more:
            inds = torch.where(inds >= len(used), torch.zeros_like(inds), inds)
        return used[inds]

    @staticmethod
    def _demand_batch(inds: Tensor) -> None:
        if inds.ndim < 2:
            raise AssertionError(f"indices need a batch axis, (b, …), not shape {tuple(inds.shape)}")
