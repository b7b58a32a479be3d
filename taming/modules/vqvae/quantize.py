"""Vector quantisation: nearest-code search with a straight-through gradient, and the renumbering of code indices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

# distances of at most this many (vector, code) pairs are held at a time: 64 MB in float32
SEARCH_BLOCK = 1 << 24


@torch.no_grad()
def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook row nearest to each vector; the first among equals.

    The distance matrix is walked in blocks and never kept for the backward pass.

    Args:
        z: vectors (n, d).
        codebook: (k, d).

    Returns:
        (n,) int64.
    """
    # |z - e|² = |z|² + |e|² - 2 z·e; |z|² is the same for every code
    lengths = codebook.pow(2).sum(dim=1)
    block = max(1, SEARCH_BLOCK // codebook.shape[0])
    return torch.cat(
        [torch.addmm(lengths, part, codebook.t(), alpha=-2).argmin(dim=1) for part in z.split(block)]
    )


class Remap(nn.Module):
    """Renumbers code indices to the codes that a data set really uses.

    Args:
        n_e: size of the codebook.
        remap: path of an `.npy` file with the used indices; None keeps the numbering.
        unknown_index: what other codes become: "random" (any used one), "extra" (one more index) or a number.
    """

    used: Tensor

    def __init__(self, n_e: int, remap: str | None, unknown_index: str | int) -> None:
        super().__init__()
        self.remap = remap
        self.unknown_index = unknown_index
        self.re_embed = n_e
        if remap is not None:
            self.register_buffer("used", torch.from_numpy(np.load(remap)).long())
            self.re_embed = len(self.used)
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Codebook indices (b, …) → positions among the used ones, same shape."""
        flat = self._rows(inds)
        used = self.used.to(flat)
        matches = flat[:, :, None] == used
        position = matches.long().argmax(dim=-1)
        unknown = ~matches.any(dim=-1)
        if self.unknown_index == "random":
            position[unknown] = torch.randint(0, self.re_embed, size=position[unknown].shape).to(position)
        else:
            position[unknown] = int(self.unknown_index)
        return position.reshape(inds.shape)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Positions among the used codes (b, …) → codebook indices, same shape; the extra index becomes the first code."""
        flat = self._rows(inds)
        used = self.used.to(flat)
        inside = torch.where(flat >= used.shape[0], torch.zeros_like(flat), flat)
        return used[inside].reshape(inds.shape)

    @staticmethod
    def _rows(inds: Tensor) -> Tensor:
        if inds.ndim < 2:
            raise AssertionError(f"indices need a batch axis, (b, …), not shape {tuple(inds.shape)}")
        return inds.reshape(inds.shape[0], -1)


class VectorQuantizer2(Remap):
    """Replaces each vector by the nearest of `n_e` learned codes; the gradient passes straight through.

    Args:
        n_e: size of the codebook.
        e_dim: channels of a code.
        beta: weight of one of the two loss terms, see `legacy`.
        remap, unknown_index: see `Remap`.
        sane_index_shape: return indices as (b, h, w) instead of flat.
        legacy: True weighs the codebook term with `beta` (as every published model was trained), False the commitment
            term (as the paper has it).

    Source: van den Oord et al. 2017, equation 3.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, remap, unknown_index)
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantise a map.

        Args:
            z: (b, e_dim, h, w).
            temp, rescale_logits, return_logits: only for the interface of the Gumbel quantiser; must stay at their defaults.

        Returns:
            The quantised map, the loss, and `(None, None, indices)` with indices (b·h·w,), (b·h·w, 1) if remapped, or
            (b, h, w) with `sane_index_shape`.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise AssertionError("temperature and logits belong to the Gumbel quantiser")
        b, _, h, w = z.shape
        vectors = rearrange(z, "b c h w -> b h w c").contiguous()
        indices = nearest_codes(vectors.reshape(-1, self.e_dim), self.embedding.weight)
        quantised = self.embedding(indices).reshape(vectors.shape)
        commitment = (quantised.detach() - vectors).pow(2).mean()
        codebook = (quantised - vectors.detach()).pow(2).mean()
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        quantised = vectors + (quantised - vectors).detach()  # straight through
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(b, -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(b, h, w)
        return rearrange(quantised, "b h w c -> b c h w").contiguous(), loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: Any) -> Tensor:
        """Codes of given indices.

        Args:
            indices: any shape, holding b·h·w indices.
            shape: (b, h, w, c); None gives the codes as (*indices.shape, c).

        Returns:
            (b, c, h, w), or see `shape`.
        """
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        codes = self.embedding(indices)
        return (
            codes
            if shape is None
            else rearrange(codes.reshape(tuple(shape)), "b h w c -> b c h w").contiguous()
        )
