"""What all quantisers share: nearest-code search, the way from indices to codes, and the figures of a codebook's use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from taming.modules.vqvae.remap import Remap

# distances of at most this many (vector, code) pairs are held at a time: 64 MB in float32
SEARCH_BLOCK = 1 << 24


@torch.no_grad()
def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook row nearest to each vector; the first among equals.

    The distance matrix is walked in blocks and never kept for the backward pass; it is in float32 at least, under
    autocast, too: half precision cannot tell near codes apart.

    Args:
        z: vectors (n, d).
        codebook: (k, d).

    Returns:
        (n,) int64.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    z, codebook = z.to(dtype), codebook.to(dtype)
    # |z - e|² = |z|² + |e|² - 2 z·e; |z|² is the same for every code
    lengths = codebook.pow(2).sum(dim=1)
    block = max(1, SEARCH_BLOCK // codebook.shape[0])
    with torch.autocast(z.device.type, enabled=False):
        return torch.cat(
            [torch.addmm(lengths, part, codebook.t(), alpha=-2).argmin(dim=1) for part in z.split(block)]
        )


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """The value of `quantised` with the gradient of `z` (van den Oord et al. 2017, section 3.2)."""
    return z + (quantised - z).detach()


def code_counts(indices: Tensor, n_codes: int) -> Tensor:
    """How often each code occurs, (n_codes,) int64."""
    flat = indices.reshape(-1)
    return flat.new_zeros(n_codes).index_add_(0, flat, torch.ones_like(flat))


def one_hot_codes(indices: Tensor, n_codes: int) -> Tensor:
    """Indices (n,) → (n, n_codes) float32 with a single one in each row."""
    flat = indices.reshape(-1, 1)
    return torch.zeros(len(flat), n_codes, device=flat.device).scatter_(1, flat, 1.0)


def perplexity_of(counts: Tensor) -> Tensor:
    """Exponential of the entropy of the codes' frequencies: as many evenly used codes carry as much."""
    frequencies = counts / counts.sum()
    return (-(frequencies * (frequencies + 1e-10).log()).sum()).exp()


class CodebookUsage:
    """Which codes occurred of late.

    Args:
        n_codes: how many there are.
        window: how many of the latest indices count; None for all that ever came.

    Source: the sliding window of LlamaGen (Sun et al. 2024), 65,536 codes long.
    """

    def __init__(self, n_codes: int, window: int | None = 1 << 16) -> None:
        self.window = window
        self.counts = torch.zeros(n_codes, dtype=torch.int64)
        self.recent = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """Take in indices of any shape; those that fall out of the window are forgotten."""
        indices = indices.detach().reshape(-1).long()
        self.counts = self.counts.to(indices.device) + code_counts(indices, len(self.counts))
        if self.window is not None:
            recent = torch.cat((self.recent.to(indices.device), indices))
            self.counts -= code_counts(recent[: -self.window], len(self.counts))
            self.recent = recent[-self.window :].clone()

    def share(self) -> Tensor:
        """Share of the codes that occurred, in [0, 1]."""
        return (self.counts > 0).float().mean()

    def perplexity(self) -> Tensor:
        """Of the frequencies with which they occurred, in [1, n_codes]."""
        return perplexity_of(self.counts)


class Quantizer(Remap):
    """Base of the quantisers: `forward(z)` → (quantised map, loss, (perplexity, one-hot codes, indices)).

    Perplexity and one-hot codes are None where the published quantiser does not return them. A subclass defines
    `forward` and `look_up`.

    Args:
        n_e: number of codes.
        e_dim: channels of a code.
        remap, unknown_index: see `Remap`; `re_embed` is the number of different indices after it.
        sane_index_shape: return indices as (b, h, w) instead of flat.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
    ) -> None:
        super().__init__(n_e, remap, unknown_index)
        self.n_e, self.e_dim = n_e, e_dim
        self.sane_index_shape = sane_index_shape

    def look_up(self, indices: Tensor) -> Tensor:
        """Codes (…, e_dim) of codebook indices (…)."""
        raise NotImplementedError

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None) -> Tensor:
        """Codes of given indices.

        Args:
            indices: any shape, holding b·h·w indices as `forward` returns them.
            shape: (b, h, w, c); None gives the codes as (*indices.shape, c).

        Returns:
            (b, c, h, w), or see `shape`.

        Raises:
            IndexError: an index that the codebook lacks.
            AssertionError: another number of indices than `shape` says.
        """
        self._demand_known(indices)
        if self.remap is not None:
            indices = self.unmap_to_all(indices[None])[0]
        codes = self.look_up(indices)
        if shape is None:
            return codes
        if codes.numel() != math.prod(shape):
            raise AssertionError(
                f"{indices.numel()} indices of codes with {self.e_dim} channels do not fill the shape {tuple(shape)}; "
                f"it must be (b, h, w, {self.e_dim}) with b·h·w indices"
            )
        return rearrange(codes.reshape(tuple(shape)), "b h w c -> b c h w").contiguous()

    def _demand_known(self, indices: Tensor) -> None:
        if indices.is_meta or not indices.numel():
            return
        low, high = (int(extreme) for extreme in indices.aminmax())
        if low < 0 or (high >= self.re_embed and not self.accepts_more):
            raise IndexError(
                f"code index {low if low < 0 else high} is outside this codebook of {self.re_embed} codes "
                f"(0 to {self.re_embed - 1}); were the indices made with another first stage, or does the "
                f"transformer's vocabulary hold more than its codes?"
            )

    def to_vectors(self, z: Tensor) -> Tensor:
        """A map (b, e_dim, h, w) → vectors (b, h, w, e_dim).

        Raises:
            ValueError: other channels than the codes have.
        """
        if z.ndim != 4 or z.shape[1] != self.e_dim:
            raise ValueError(
                f"{type(self).__name__} quantises maps (b, {self.e_dim}, h, w), not {tuple(z.shape)}; "
                f"the model's embed_dim must be the channels of a code"
            )
        return rearrange(z, "b c h w -> b h w c").contiguous()

    @staticmethod
    def to_map(vectors: Tensor) -> Tensor:
        """Vectors (b, h, w, c) → a map (b, c, h, w)."""
        return rearrange(vectors, "b h w c -> b c h w").contiguous()

    def number(self, indices: Tensor, z: Tensor) -> Tensor:
        """Codebook indices (b·h·w,) as `forward` returns them: flat, (b·h·w, 1) if remapped, or (b, h, w).

        Args:
            indices: of the codebook.
            z: the map that they quantise, (b, c, h, w).
        """
        b, _, h, w = z.shape
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(b, -1)).reshape(-1, 1)
        return indices.reshape(b, h, w) if self.sane_index_shape else indices
