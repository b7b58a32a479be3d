"""Vector quantisation: each vector of a map becomes one of finitely many codes.

`VectorQuantizer` and `VectorQuantizer2` take the nearest code of a learned codebook. Their siblings draw it
(`GumbelQuantize`), move the codebook by running averages (`EMAVectorQuantizer`) or do without one (`FSQ`, `LFQ`).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vqvae.codebook import (
    CodebookUsage,
    Quantizer,
    code_counts,
    nearest_codes,
    one_hot_codes,
    perplexity_of,
    straight_through,
)
from taming.modules.vqvae.ema import EMAVectorQuantizer, EmbeddingEMA
from taming.modules.vqvae.gumbel import GumbelQuantize
from taming.modules.vqvae.lookup_free import FSQ, LFQ
from taming.modules.vqvae.remap import Remap

__all__ = [
    "FSQ", "LFQ", "CodebookUsage", "EMAVectorQuantizer", "EmbeddingEMA", "GumbelQuantize", "Quantizer", "Remap",
    "VectorQuantizer", "VectorQuantizer2", "nearest_codes",
]  # fmt: skip


class VectorQuantizer2(Quantizer):
    """Replaces each vector by the nearest of `n_e` learned codes; the gradient passes straight through.

    Args:
        n_e: size of the codebook.
        e_dim: channels of a code.
        beta: weight of one of the two loss terms, see `legacy`.
        remap, unknown_index: see `Remap`.
        sane_index_shape: return indices as (b, h, w) instead of flat.
        legacy: True weighs the codebook term with `beta` (as every published model was trained), False the commitment
            term (as the paper has it).
        l2_norm: vectors and codes are brought to length 1, so that the nearest code is that of the smallest angle; with
            few channels (8 to 32, set by the model's embed_dim) nearly all codes of a large codebook come into use.

    Source: van den Oord et al. 2017, equation 3; `l2_norm`: Yu et al. 2022 (ViT-VQGAN), section 3.2.
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
        l2_norm: bool = False,
    ) -> None:
        super().__init__(n_e, e_dim, remap, unknown_index, sane_index_shape)
        self.beta = beta
        self.legacy = legacy
        self.l2_norm = l2_norm
        self.embedding: Any = self.make_codebook()

    def make_codebook(self) -> nn.Module:
        """The codes to begin with, as `weight` (n_e, e_dim) of what looks them up."""
        codebook = nn.Embedding(self.n_e, self.e_dim)
        codebook.weight.data.uniform_(-1.0 / self.n_e, 1.0 / self.n_e)
        return codebook

    def look_up(self, indices: Tensor) -> Tensor:
        """Codes (…, e_dim) of codebook indices (…)."""
        return self._scaled(self.embedding(indices))

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
        quantised, loss, indices = self.quantise(z)
        return quantised, loss, (None, None, self.number(indices, z))

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The quantised map, the loss, and the codebook's indices (b·h·w,)."""
        vectors = self._scaled(self.to_vectors(z))
        indices = nearest_codes(vectors.reshape(-1, self.e_dim), self._scaled(self.embedding.weight))
        quantised = self.look_up(indices).reshape(vectors.shape)
        commitment = (quantised.detach() - vectors).pow(2).mean()
        codebook = (quantised - vectors.detach()).pow(2).mean()
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        return self.to_map(straight_through(vectors, quantised)), loss, indices

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors


class VectorQuantizer(VectorQuantizer2):
    """The earlier form of `VectorQuantizer2`: it also returns perplexity and one-hot codes.

    These are (b·h·w, n_e) numbers in memory; `VectorQuantizer2` does without them.

    Args:
        n_e: size of the codebook.
        e_dim: channels of a code.
        beta: weight of the codebook term (the commitment term weighs 1), as published.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__(n_e, e_dim, beta)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Quantise a map.

        Args:
            z: (b, e_dim, h, w).

        Returns:
            The quantised map, the loss, and perplexity (), one-hot codes (b·h·w, n_e), indices (b·h·w, 1).
        """
        quantised, loss, indices = self.quantise(z)
        perplexity = perplexity_of(code_counts(indices, self.n_e))
        onehot = one_hot_codes(indices, self.n_e)
        return quantised, loss, (perplexity, onehot, indices[:, None])
